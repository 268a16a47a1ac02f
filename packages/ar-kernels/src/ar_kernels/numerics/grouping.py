"""Views of a matrix as groups that share one scale, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ar_schemes import Granularity


def grouped(x: Tensor, granularity: Granularity) -> Tensor:
    """Return [..., O, I] as [..., R, G, r * c]: one row of elements per scale.

    R and G are the dimensions of the scale; r and c those of the region that shares one.
    """
    rows, columns = x.shape[-2:]
    count_r, count_c = granularity.scale_shape(rows, columns)
    step_r, step_c = rows // count_r, columns // count_c
    if step_r == 1:
        return x.reshape(*x.shape[:-1], count_c, step_c)
    tiles = x.reshape(*x.shape[:-2], count_r, step_r, count_c, step_c)
    return tiles.transpose(-3, -2).reshape(*x.shape[:-2], count_r, count_c, step_r * step_c)


def ungrouped(groups: Tensor, shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    """Return the inverse of `grouped` for a matrix of `shape`."""
    rows, columns = shape[-2:]
    count_r, count_c = granularity.scale_shape(rows, columns)
    step_r, step_c = rows // count_r, columns // count_c
    if step_r == 1:
        return groups.reshape(shape)
    tiles = groups.reshape(*shape[:-2], count_r, count_c, step_r, step_c)
    return tiles.transpose(-3, -2).reshape(shape)


def expand(scale: Tensor, shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    """Return one scale per element: [..., R, G] as [..., O, I]."""
    rows, columns = shape[-2:]
    count_r, count_c = granularity.scale_shape(rows, columns)
    wide = scale.repeat_interleave(columns // count_c, dim=-1)
    return wide if count_r == rows else wide.repeat_interleave(rows // count_r, dim=-2)
