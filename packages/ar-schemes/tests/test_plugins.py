"""Plugins come from distributions written to a temporary folder: metadata and modules only."""

from __future__ import annotations

import logging
import types
from importlib import metadata
from typing import TYPE_CHECKING

import pluggy
import pytest

from ar_schemes import PluginError, PluginHost, Registry, Scheme, hookspecs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEAD = """
from ar_schemes import Scheme, hookimpl

def give(*names):
    return [Scheme(name=n) for n in names]

"""
GOOD = HEAD + "@hookimpl\ndef ar_register_schemes():\n    return give('{0}')\n"


class Builtin:
    """The first-party plugin of the host under test."""

    @staticmethod
    @pluggy.HookimplMarker("ar_schemes")
    def ar_register_schemes() -> list[Scheme]:
        return [Scheme(name="FIRST")]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a distribution with one plugin: install(name, source, dist=..., entries=...)."""
    monkeypatch.syspath_prepend(tmp_path)
    count = 0

    def run(
        name: str,
        source: str,
        *,
        dist: str = "",
        entries: str = "",
        meta: str = "",
        attribute: str = "",
    ) -> None:
        nonlocal count
        count += 1
        module = f"{tmp_path.name}_{count}".replace("-", "_")
        owner = dist or f"ar-plugin-{name}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{owner.replace('-', '_')}-1.{count}.dist-info"
        info.mkdir()
        facts = f"Metadata-Version: 2.1\nName: {owner}\nVersion: 1.{count}\n"
        (info / "METADATA").write_text(meta or facts)
        text = entries or f"[ar_schemes]\n{name} = {module}{attribute and ':'}{attribute}\n"
        (info / "entry_points.txt").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    return run


def namespace(**functions: object) -> types.ModuleType:
    made = types.ModuleType("made_here")
    vars(made).update(functions)
    return made


def make(**options) -> tuple[PluginHost, Registry[Scheme]]:
    options = {"env": {}, "builtins": {"builtin": Builtin}} | options
    host = PluginHost("ar_schemes", hookspecs, **options)
    return host, Registry(host, "ar_register_schemes", kind=Scheme, name_of=lambda s: s.name)


def status(host: PluginHost) -> dict[str, str]:
    return {r.name: r.status for r in host.records}


def error(host: PluginHost) -> str:
    (failed,) = host.failures
    return str(failed.error)


def test_a_plugin_adds_its_names_and_is_recorded(install) -> None:
    install("good", GOOD.format("X"))
    host, registry = make()
    assert set(registry.all()) == {"FIRST", "X"}
    assert registry.owner("x") == "good"
    builtin, good = host.records
    assert (builtin.name, builtin.dist, builtin.provides) == ("builtin", "(built in)", ("FIRST",))
    assert (good.host, good.name, good.dist) == ("ar_schemes", "good", "ar-plugin-good")
    assert (good.version, good.status, good.error) == ("1.1", "ok", None)
    assert good.hooks == ("ar_register_schemes",)
    assert good.provides == ("X",)


BROKEN = {
    "import": ("raise RuntimeError('boom')", "boom"),
    "exit": ("raise ImportError('needs a library')", "needs a library"),
    "syntax": ("def broken(:", "invalid syntax"),
    "call": (
        HEAD + "@hookimpl\ndef ar_register_schemes():\n    raise RuntimeError('boom')\n",
        "boom",
    ),
    "iterate": (
        HEAD + "@hookimpl\ndef ar_register_schemes():\n    yield give('X')[0]\n    1 / 0\n",
        "division by zero",
    ),
    "unknown-hook": (
        HEAD + "@hookimpl\ndef ar_register_scheme():\n    return []\n",
        "unknown hook 'ar_register_scheme'; ar_schemes knows ar_register_schemes",
    ),
    "argument": (
        HEAD + "@hookimpl\ndef ar_register_schemes(model):\n    return []\n",
        "model",
    ),
    "default": (
        HEAD + "@hookimpl\ndef ar_register_schemes(model=1):\n    return []\n",
        "leave the defaults out",
    ),
    "alias": (
        HEAD + "@hookimpl(specname='ar_register_schemes')\ndef mine():\n    return []\n",
        "name the function ar_register_schemes, without specname",
    ),
    "kind": (
        HEAD + "@hookimpl\ndef ar_register_schemes():\n    return ['W4A16']\n",
        "returned 'W4A16', not a Scheme",
    ),
    "not-iterable": (HEAD + "@hookimpl\ndef ar_register_schemes():\n    return 7\n", "iterable"),
    "name": (GOOD.format("two words"), "the name 'two words' is not allowed"),
    "empty-name": (GOOD.format(""), "the name '' is not allowed"),
    "built-in-name": (
        GOOD.format("first"),
        "'first' of plugin bad (ar-plugin-bad) is already taken by plugin builtin ((built in))",
    ),
    "own-twice": (
        HEAD + "@hookimpl\ndef ar_register_schemes():\n    return give('X', 'x')\n",
        "'x' of plugin bad (ar-plugin-bad) is already taken by plugin bad",
    ),
}


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_left_out_with_all_it_brings(install, source, message, caplog) -> None:
    install("bad", source)
    install("good", GOOD.format("GOOD"))
    host, registry = make()
    with caplog.at_level(logging.WARNING, "ar_schemes"):
        assert set(registry.all()) == {"FIRST", "GOOD"}
    assert status(host) == {"builtin": "ok", "bad": "failed", "good": "ok"}
    assert message in error(host)
    assert "plugin bad (ar-plugin-bad 1.1) left out" in caplog.text


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("how", [{"strict": True}, {"env": {"AR_PLUGINS_STRICT": "1"}}])
def test_strict_raises_what_broke(install, source, message, how) -> None:
    install("bad", source)
    _, registry = make(**how)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the plugin's own error
        registry.all()
    assert message in str(caught.value)


def test_a_plugin_that_raises_is_named_in_the_notes(install) -> None:
    install("bad", BROKEN["call"][0])
    host, registry = make()
    registry.all()
    (failed,) = host.failures
    assert "in hook ar_register_schemes of plugin bad" in failed.error.__notes__


def test_a_plugin_that_failed_is_not_asked_again(install) -> None:
    install("bad", BROKEN["call"][0])
    host, registry = make()
    registry.all()
    assert [name for name, _ in host.each("ar_register_schemes")] == ["builtin"]


def test_a_plugin_that_is_not_there_is_left_out(install) -> None:
    install("gone", "", entries="[ar_schemes]\ngone = ar_no_such_module\n")
    host, registry = make()
    assert set(registry.all()) == {"FIRST"}
    assert "ar_no_such_module" in error(host)


def test_one_unreadable_entry_point_file_costs_only_its_own_plugins(install) -> None:
    install("stray", "", entries="[ar_schemes]\na line that is no entry point\n")
    install("good", GOOD.format("GOOD"))
    host, registry = make()
    assert set(registry.all()) >= {"FIRST", "GOOD"}
    assert [r.dist for r in host.failures] == ["ar-plugin-stray"]


def test_a_distribution_without_a_name_does_no_harm(install) -> None:
    install("anon", GOOD.format("X"), meta="Metadata-Version: 2.1\n")
    host, registry = make()
    assert "X" in registry.all()
    assert (host.records[1].dist, host.records[1].version) == ("?", "?")


def test_an_entry_point_outside_any_distribution_is_taken(install) -> None:
    lone = metadata.EntryPoint("gone", "ar_no_such_module", "ar_schemes")
    host, registry = make(entry_points=[lone])
    registry.all()
    assert host.failures[0].dist == "?"


def test_of_two_third_parties_with_one_name_the_second_is_refused(install) -> None:
    install("one", GOOD.format("X"))
    install("two", GOOD.format("x"))
    host, registry = make()
    assert registry.owner("X" if "X" in registry.all() else "") == "one"
    assert "'x' of plugin two (ar-plugin-two) is already taken by plugin one" in error(host)


@pytest.mark.parametrize("name", ["twin", "builtin"])
def test_of_two_plugins_with_one_entry_point_name_the_second_is_refused(install, name) -> None:
    install(name, GOOD.format("X"), dist="ar-plugin-a")
    install(name, GOOD.format("Y"), dist="ar-plugin-b")
    host, registry = make()
    assert len(set(registry.all()) & {"X", "Y"}) == (1 if name == "twin" else 0)
    assert all("is already used by" in str(r.error) for r in host.failures)
    assert all(isinstance(r.error, PluginError) for r in host.failures)


def test_a_module_under_two_entry_point_names_is_taken_once(install) -> None:
    install("good", GOOD.format("X"))
    (first,) = metadata.entry_points(group="ar_schemes", name="good")
    twice = [first, metadata.EntryPoint("zwei", first.value, "ar_schemes")]
    host, registry = make(entry_points=twice)
    assert set(registry.all()) == {"FIRST", "X"}
    assert status(host) == {"builtin": "ok", "good": "ok", "zwei": "failed"}


def test_a_plugin_without_a_hash_is_left_out(install) -> None:
    install("good", GOOD.format("X"))
    install("odd", "import types\nplugin = types.SimpleNamespace()\n", attribute="plugin")
    host, registry = make()
    assert set(registry.all()) == {"FIRST", "X"}
    assert "unhashable" in error(host)


@pytest.mark.parametrize(
    ("env", "loaded"),
    [
        ({}, {"one", "two"}),
        ({"AR_PLUGINS": "one"}, {"one"}),
        ({"AR_PLUGINS": " one , two,"}, {"one", "two"}),
        ({"AR_PLUGINS": ""}, set()),
        ({"AR_DISABLED_PLUGINS": "one"}, {"two"}),
        ({"AR_DISABLED_PLUGINS": ""}, {"one", "two"}),
        ({"AR_PLUGINS": "one,two", "AR_DISABLED_PLUGINS": "two"}, {"one"}),
    ],
    ids=["all", "only-one", "spaces", "none", "without", "without-none", "both"],
)
def test_the_environment_chooses_the_plugins(install, env, loaded) -> None:
    for name in ("one", "two"):
        install(name, GOOD.format(name))
    host, registry = make(env=env)
    assert set(registry.all()) == {"FIRST", *loaded}
    assert {n for n, s in status(host).items() if s == "disabled"} == {"one", "two"} - loaded


def test_a_disabled_plugin_is_not_imported(install) -> None:
    install("bad", "raise RuntimeError('boom')")
    host, registry = make(env={"AR_DISABLED_PLUGINS": "bad", "AR_PLUGINS_STRICT": "1"})
    registry.all()
    assert status(host)["bad"] == "disabled"


@pytest.mark.parametrize(
    ("env", "expected"),
    [({"AR_PLUGINS": ""}, "ok"), ({"AR_DISABLED_PLUGINS": "ar_export"}, "disabled")],
    ids=["allow-list", "deny-list"],
)
def test_a_first_party_package_is_left_out_only_by_name(install, env, expected) -> None:
    install("ar_export", GOOD.format("X"), dist="ar-export")
    host, registry = make(env=env)
    registry.all()
    assert status(host)["ar_export"] == expected


def test_built_in_names_resolve_without_loading_plugins(install) -> None:
    install("bad", "raise RuntimeError('boom')")
    host, registry = make()
    assert registry.find("first") is not None
    assert status(host) == {"builtin": "ok"}
    assert registry.find("nothing") is None
    assert status(host)["bad"] == "failed"


def test_a_broken_first_party_plugin_raises_at_once() -> None:
    def ar_register_schemes() -> list[Scheme]:
        msg = "our own mistake"
        raise RuntimeError(msg)

    marked = pluggy.HookimplMarker("ar_schemes")(ar_register_schemes)
    ours = namespace(ar_register_schemes=marked)
    _, registry = make(builtins={"ours": ours})
    with pytest.raises(RuntimeError, match="our own mistake"):
        registry.find("anything")


def test_plugins_are_loaded_once(install) -> None:
    install("good", GOOD.format("X"))
    host, _ = make()
    host.load()
    before = host.records
    host.load()
    assert host.records == before


def test_calls_are_traced_on_request(install, caplog) -> None:
    install("good", GOOD.format("X"))
    _, registry = make(env={"AR_TRACE_HOOKS": "1"})
    with caplog.at_level(logging.WARNING, "ar_schemes"):
        registry.all()
    assert "ar_register_schemes" in caplog.text


CHOICE_SPECS = types.ModuleType("choice_specs")
spec = pluggy.HookspecMarker("ar_choice")
impl = pluggy.HookimplMarker("ar_choice")


@spec(firstresult=True)
def ar_choose(word: str) -> str | None: ...


@spec
def ar_note(word: str) -> None: ...


CHOICE_SPECS.ar_choose = ar_choose
CHOICE_SPECS.ar_note = ar_note


def choosing(answer: str | None, heard: list[str] | None = None) -> types.ModuleType:
    @impl
    def ar_choose(word: str) -> str | None:
        if answer == "raise":
            raise RuntimeError(word)
        return answer

    @impl
    def ar_note(word: str) -> None:
        if answer == "raise":
            raise RuntimeError(word)
        assert heard is not None
        heard.append(word)

    return namespace(ar_choose=ar_choose, ar_note=ar_note)


def choice(**third: types.ModuleType) -> PluginHost:
    heard: list[str] = []
    host = PluginHost(
        "ar_choice",
        CHOICE_SPECS,
        builtins={"builtin": choosing("ours", heard)},
        env={},
        entry_points=[],
    )
    for name, plugin in third.items():
        host._register(name, plugin, f"dist-{name}", "1")
    return host


def test_the_first_answer_that_is_not_none_wins_third_parties_first() -> None:
    assert choice().first("ar_choose", word="w") == "ours"
    assert choice(a=choosing(None), b=choosing("theirs")).first("ar_choose", word="w") == "theirs"


def test_no_answer_at_all_is_none() -> None:
    host = PluginHost("ar_choice", CHOICE_SPECS, builtins={}, env={}, entry_points=[])
    assert host.first("ar_choose", word="w") is None


def test_a_choice_that_raises_fails_loudly_and_names_the_plugin() -> None:
    with pytest.raises(RuntimeError) as caught:
        choice(a=choosing("raise")).first("ar_choose", word="w")
    assert caught.value.__notes__ == ["in hook ar_choose of plugin a (dist-a)"]


def test_a_notification_reaches_everyone_though_one_raises() -> None:
    heard: list[str] = []
    host = choice(a=choosing("raise"), b=choosing("x", heard))
    host.notify("ar_note", word="w")
    assert heard == ["w"]
    assert [r.name for r in host.failures] == ["a"]


def test_what_a_plugin_provides_is_collected_without_repeats() -> None:
    host = choice(a=choosing("x"))
    host.provided("a", ["one", "two"])
    host.provided("a", ["two", "three"])
    assert host.records[1].provides == ("one", "two", "three")
    assert host.dist_of("a") == "dist-a"
