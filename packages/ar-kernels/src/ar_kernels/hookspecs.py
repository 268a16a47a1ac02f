"""Hooks that ar-kernels calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ar_kernels.backends.base import Backend, Need
    from ar_kernels.layouts.base import Layout
    from ar_kernels.numerics.base import DataType

hookspec = pluggy.HookspecMarker("ar_kernels")
hookimpl = pluggy.HookimplMarker("ar_kernels")


@hookspec
def ar_register_data_types() -> Iterable[DataType]:  # type: ignore[empty-body]
    """Return data types: the arithmetic that `TensorSpec.data_type` names."""


@hookspec
def ar_register_layouts() -> Iterable[Layout]:  # type: ignore[empty-body]
    """Return bit layouts: pack and unpack of a `QuantizedWeight`."""


@hookspec
def ar_register_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Return backends: families of kernels on one kind of device."""


@hookspec(firstresult=True)
def ar_choose_backend(need: Need, usable: Sequence[Backend]) -> str | None:
    """Return the name of the backend to use for a layer, or None to leave the choice.

    `usable` holds the backends that support the need, best first. Stops at the first result.
    """
