"""What ar-kernels gains: the arithmetic, the bit order, the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_kernels import hookimpl
from ar_plugin_nf4.backend import Nf4Lookup
from ar_plugin_nf4.data_type import NormalFloat4
from ar_plugin_nf4.layout import Nf4Layout

if TYPE_CHECKING:
    from ar_kernels.backends import Backend
    from ar_kernels.layouts import Layout
    from ar_kernels.numerics import DataType


@hookimpl
def ar_register_data_types() -> list[DataType]:
    """Return the data type `nf4`."""
    return [NormalFloat4()]


@hookimpl
def ar_register_layouts() -> list[Layout]:
    """Return the layout `nf4`."""
    return [Nf4Layout()]


@hookimpl
def ar_register_backends() -> list[Backend]:
    """Return the backend `nf4_lookup`."""
    return [Nf4Lookup()]
