"""The values that weights may take once their parameters are committed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels import data_type
from ar_kernels.numerics import Params, column_params, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from ar_schemes import TensorSpec


@dataclass(frozen=True)
class Grid:
    """Committed parameters of one weight, or of several of one spec stacked by rows.

    Attributes:
        spec: the representation they have in common.
        params: by weight.
        shapes: [O, I] by weight; the I are equal.
    """

    spec: TensorSpec
    params: tuple[Params, ...]
    shapes: tuple[tuple[int, int], ...]

    def columns(self, which: Tensor) -> list[Params]:
        """Return the parameters of some columns, one `Params` of [O] tensors for each."""
        parts = [
            column_params(params, self.spec, shape, which)
            for params, shape in zip(self.params, self.shapes, strict=True)
        ]
        scale = _by_column([p.scale for p in parts])
        zeros = [p.zero_point for p in parts if p.zero_point is not None]
        zero = _by_column(zeros) if zeros else None
        first = parts[0]
        extra = {
            name: _by_column([p.extra[name] for p in parts])
            for name, value in first.extra.items()
            if value.shape == first.scale.shape
        }
        others = {k: v for k, v in first.extra.items() if k not in extra} if len(parts) == 1 else {}
        return [
            Params(
                scale[i],
                None if zero is None else zero[i],
                {**others, **{name: value[i] for name, value in extra.items()}},
            )
            for i in range(len(which))
        ]

    def nearest(self, values: Tensor, params: Params) -> Tensor:
        """Return the values of the grid nearest to `values` [O] of one column."""
        return nearest(values, self.spec, params, kind=data_type(self.spec.data_type))

    def rounded(self, weights: Tensor) -> Tensor:
        """Return stacked weights [O, I] rounded to nearest, float32."""
        kind = data_type(self.spec.data_type)
        parts = weights.split([shape[0] for shape in self.shapes])
        with torch.no_grad():
            return torch.cat(
                [kind.fake_quant(w, self.spec, p) for w, p in zip(parts, self.params, strict=True)]
            )


def _by_column(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).t().contiguous()
