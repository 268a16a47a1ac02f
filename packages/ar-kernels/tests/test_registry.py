"""Names of data types, layouts and backends, and plugins that add to them."""

from __future__ import annotations

import pytest

import ar_kernels
from ar_kernels import KernelError, builtin, hookimpl, hookspecs
from ar_kernels.backends.base import Backend
from ar_kernels.backends.dense import Dense
from ar_kernels.layouts.base import Layout
from ar_kernels.layouts.gptq import GptqLayout
from ar_kernels.numerics.base import DataType
from ar_kernels.numerics.integer import Integer
from ar_schemes import PluginError, PluginHost, Registry


def test_the_built_in_parts_are_there_by_name() -> None:
    assert isinstance(ar_kernels.data_type("int"), Integer)
    assert ar_kernels.layout("gptq").name == "gptq"
    assert ar_kernels.backend("DENSE").name == "dense"
    assert {"int"} <= ar_kernels.data_types().keys()
    assert {"gptq", "gptq_v2", "gptq_g_idx", "gptq_v2_g_idx"} <= ar_kernels.layouts().keys()
    assert {"reference", "dense"} <= ar_kernels.backends().keys()


def test_built_in_parts_fulfil_their_protocols() -> None:
    assert all(isinstance(item, DataType) for item in ar_kernels.data_types().values())
    assert all(isinstance(item, Layout) for item in ar_kernels.layouts().values())
    assert all(isinstance(item, Backend) for item in ar_kernels.backends().values())


@pytest.mark.parametrize(
    ("look_up", "wrong", "near"),
    [
        (ar_kernels.data_type, "itn", "int"),
        (ar_kernels.layout, "gptq_v3", "gptq_v2"),
        (ar_kernels.backend, "dens", "dense"),
    ],
    ids=["data type", "layout", "backend"],
)
def test_unknown_names_suggest_the_nearest(look_up: object, wrong: str, near: str) -> None:
    assert callable(look_up)
    with pytest.raises(KernelError, match=f"(?s){wrong}.*Did you mean.*{near}.*Known: "):
        look_up(wrong)


class _Plugin:
    @hookimpl
    def ar_register_layouts(self) -> list[Layout]:
        return [GptqLayout("mine", zero_shift=0)]


class _Thief:
    @hookimpl
    def ar_register_backends(self) -> list[Backend]:
        return [Dense()]


class _Confused:
    @hookimpl
    def ar_register_data_types(self) -> list[object]:
        return ["int"]


def _host(plugin: object) -> PluginHost:
    return PluginHost(
        "ar_kernels",
        hookspecs,
        builtins={"builtin": builtin, "plugin": plugin},
        entry_points=(),
    )


def test_hook_ar_register_layouts() -> None:
    registry: Registry[Layout] = Registry(
        _host(_Plugin()), "ar_register_layouts", kind=Layout, name_of=lambda item: item.name
    )
    assert registry.all().keys() >= {"gptq", "mine"}


def test_hook_ar_register_backends_refuses_a_taken_name() -> None:
    registry: Registry[Backend] = Registry(
        _host(_Thief()), "ar_register_backends", kind=Backend, name_of=lambda item: item.name
    )
    with pytest.raises(PluginError, match="'dense' of plugin plugin .* already taken"):
        registry.all()


def test_hook_ar_register_data_types_refuses_what_is_no_data_type() -> None:
    registry: Registry[DataType] = Registry(
        _host(_Confused()), "ar_register_data_types", kind=DataType, name_of=lambda item: item.name
    )
    with pytest.raises(PluginError, match="not a DataType"):
        registry.all()
