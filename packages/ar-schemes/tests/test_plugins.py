from __future__ import annotations

import sys
import types
from importlib import metadata

import pluggy
import pytest

from ar_schemes import PluginHost, Registry, hookspecs, scheme
from ar_schemes.scheme import Scheme

impl = pluggy.HookimplMarker("ar_schemes")


def module(name: str, **functions) -> types.ModuleType:
    made = types.ModuleType(name)
    for key, function in functions.items():
        function.__module__ = name
        setattr(made, key, impl(function))
    return made


def entry(name: str, found: types.ModuleType, monkeypatch) -> metadata.EntryPoint:
    monkeypatch.setitem(sys.modules, found.__name__, found)
    return metadata.EntryPoint(name, found.__name__, "ar_schemes")


def giving(*names: str):
    def ar_register_schemes():
        return [Scheme(name=n, weight=scheme("W4A16").weight) for n in names]

    return ar_register_schemes


def raising():
    def ar_register_schemes():
        raise RuntimeError("boom")

    return ar_register_schemes


def make(entries, env=None, **kwargs):
    builtins = {"builtin": module("first", ar_register_schemes=giving("FIRST"))}
    host = PluginHost(
        "ar_schemes", hookspecs, builtins=builtins, env=env or {}, entry_points=entries, **kwargs
    )
    return host, Registry(host, "ar_register_schemes", kind=Scheme, name_of=lambda s: s.name)


def status(host) -> dict[str, str]:
    return {r.name: r.status for r in host.records}


def test_a_plugin_adds_its_names_and_is_recorded(monkeypatch) -> None:
    host, registry = make(
        [entry("good", module("good_mod", ar_register_schemes=giving("X")), monkeypatch)]
    )
    assert set(registry.all()) == {"FIRST", "X"}
    record = next(r for r in host.records if r.name == "good")
    assert record.provides == ("X",)
    assert record.hooks == ("ar_register_schemes",)
    assert registry.owner("X") == "good"


def test_a_plugin_that_raises_is_left_out_and_the_others_work(monkeypatch) -> None:
    entries = [
        entry("bad", module("bad_mod", ar_register_schemes=raising()), monkeypatch),
        entry("good", module("good_mod", ar_register_schemes=giving("X")), monkeypatch),
    ]
    host, registry = make(entries)
    assert set(registry.all()) == {"FIRST", "X"}
    assert status(host)["bad"] == "failed"
    assert "boom" in str(host.failures[0].error)


def test_a_plugin_that_cannot_be_imported_is_left_out() -> None:
    host, registry = make([metadata.EntryPoint("gone", "no_such_module", "ar_schemes")])
    assert set(registry.all()) == {"FIRST"}
    assert status(host)["gone"] == "failed"


def test_a_hook_that_does_not_exist_is_found(monkeypatch) -> None:
    def ar_register_scheme():
        return []

    host, registry = make(
        [entry("typo", module("typo_mod", ar_register_scheme=ar_register_scheme), monkeypatch)]
    )
    registry.all()
    assert status(host)["typo"] == "failed"
    assert "ar_register_schemes" in str(host.failures[0].error)


def test_a_name_that_is_taken_is_refused(monkeypatch) -> None:
    host, registry = make(
        [entry("thief", module("thief_mod", ar_register_schemes=giving("first")), monkeypatch)]
    )
    assert set(registry.all()) == {"FIRST"}
    assert "first" in str(host.failures[0].error).lower()


def test_a_result_of_the_wrong_kind_is_refused(monkeypatch) -> None:
    def ar_register_schemes():
        return ["W4A16"]

    host, registry = make(
        [entry("odd", module("odd_mod", ar_register_schemes=ar_register_schemes), monkeypatch)]
    )
    assert set(registry.all()) == {"FIRST"}
    assert status(host)["odd"] == "failed"


def test_strict_raises_at_once(monkeypatch) -> None:
    entries = [entry("bad", module("bad_mod", ar_register_schemes=raising()), monkeypatch)]
    _, registry = make(entries, strict=True)
    with pytest.raises(RuntimeError, match="boom"):
        registry.all()
    _, registry = make(entries, env={"AR_PLUGINS_STRICT": "1"})
    with pytest.raises(RuntimeError, match="boom"):
        registry.all()


@pytest.mark.parametrize(
    ("env", "loaded"),
    [
        ({"AR_PLUGINS": "one"}, {"one"}),
        ({"AR_PLUGINS": ""}, set()),
        ({"AR_DISABLED_PLUGINS": "one"}, {"two"}),
        ({}, {"one", "two"}),
    ],
    ids=["only", "none", "without", "all"],
)
def test_the_environment_chooses_the_plugins(monkeypatch, env, loaded) -> None:
    entries = [
        entry(n, module(f"{n}_mod", ar_register_schemes=giving(n)), monkeypatch)
        for n in ("one", "two")
    ]
    host, registry = make(entries, env=env)
    assert set(registry.all()) == {"FIRST", *loaded}
    assert {n for n, s in status(host).items() if s == "disabled"} == {"one", "two"} - loaded


def test_built_in_names_resolve_without_loading_plugins() -> None:
    host, registry = make([metadata.EntryPoint("gone", "no_such_module", "ar_schemes")])
    assert registry.find("first") is not None
    assert "gone" not in status(host)
    assert registry.find("nothing") is None
    assert "gone" in status(host)
