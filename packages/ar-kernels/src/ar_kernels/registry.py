"""Look up data types, layouts and backends by name."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ar_kernels import builtin, hookspecs
from ar_kernels.backends.base import Backend
from ar_kernels.layouts.base import Layout
from ar_kernels.numerics.base import DataType
from ar_kernels.weight import KernelError
from ar_schemes import PluginHost, Registry, unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping


@functools.cache
def host() -> PluginHost:
    """Return the process's host of ar-kernels, made on first use."""
    return PluginHost("ar_kernels", hookspecs, builtins={"builtin": builtin})


@functools.cache
def _data_types() -> Registry[DataType]:
    return Registry(host(), "ar_register_data_types", kind=DataType, name_of=lambda item: item.name)


@functools.cache
def _layouts() -> Registry[Layout]:
    return Registry(host(), "ar_register_layouts", kind=Layout, name_of=lambda item: item.name)


@functools.cache
def _backends() -> Registry[Backend]:
    return Registry(host(), "ar_register_backends", kind=Backend, name_of=lambda item: item.name)


def data_types() -> Mapping[str, DataType]:
    """Return every data type, plugins' included."""
    return _data_types().all()


def data_type(name: str) -> DataType:
    """Return a data type by name.

    Raises:
        KernelError: no such data type is installed.
    """
    found = _data_types().find(name)
    if found is None:
        hint = "A scheme of this data type can be named but not computed by this installation."
        raise KernelError(unknown_name("data type", name, data_types(), hint=hint))
    return found


def layouts() -> Mapping[str, Layout]:
    """Return every layout, plugins' included."""
    return _layouts().all()


def layout(name: str) -> Layout:
    """Return a layout by name.

    Raises:
        KernelError: no such layout is installed.
    """
    found = _layouts().find(name)
    if found is None:
        raise KernelError(unknown_name("layout", name, layouts()))
    return found


def backends() -> Mapping[str, Backend]:
    """Return every backend, plugins' included."""
    return _backends().all()


def backend(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        KernelError: no such backend is installed.
    """
    found = _backends().find(name)
    if found is None:
        raise KernelError(unknown_name("backend", name, backends()))
    return found
