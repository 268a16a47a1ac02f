"""The arithmetic of each representation. The only place where rounding is defined."""

from ar_kernels.numerics.base import DataType, Params
from ar_kernels.numerics.grouping import expand, grouped, ungrouped

__all__ = ["DataType", "Params", "expand", "grouped", "ungrouped"]
