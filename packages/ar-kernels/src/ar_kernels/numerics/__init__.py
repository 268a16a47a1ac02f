"""The arithmetic of each representation. The only place where rounding is defined."""

from ar_kernels.numerics.base import DataType, Params
from ar_kernels.numerics.columns import (
    Columnwise,
    column_params,
    map_groups,
    nearest,
    params_of,
)
from ar_kernels.numerics.grouping import expand, grouped, ungrouped

__all__ = [
    "Columnwise",
    "DataType",
    "Params",
    "column_params",
    "expand",
    "grouped",
    "map_groups",
    "nearest",
    "params_of",
    "ungrouped",
]
