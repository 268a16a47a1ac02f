"""Rounding column by column under parameters that are already committed.

Solvers that correct each column for the errors of the ones before it, in any order, need one
thing of a data type: the representable value nearest to a wanted one. `nearest` gives it to the
bit as `fake_quant` would. A data type may bring its own (`Columnwise`), which is faster; every
other one is served through its `fake_quant`, seeing each value as a group of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from ar_kernels.numerics.base import Params
from ar_kernels.weight import equal
from ar_schemes import Granularity, Span

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ar_kernels.numerics.base import DataType
    from ar_kernels.weight import QuantizedWeight
    from ar_schemes import TensorSpec

_ALONE = Granularity(Span.GROUP, (1,))


@runtime_checkable
class Columnwise(Protocol):
    """What a data type may add to `DataType` for solvers that round single columns."""

    def nearest(self, values: Tensor, spec: TensorSpec, params: Params) -> Tensor:
        """Return the representable values nearest to `values` (any shape), float32.

        `params` are those of `column_params`: one value per element. Equal to the bit to what
        `fake_quant` gives for these elements.
        """

    def params_of(self, weight: QuantizedWeight) -> Params:
        """Return the parameters a weight was quantized with.

        `quantize(dequantize(weight), spec, params_of(weight))` gives the weight back.
        """


def column_params(
    params: Params, spec: TensorSpec, shape: tuple[int, ...], columns: Tensor
) -> Params:
    """Return the parameters of some columns of a weight, one value per element [..., O, n].

    Args:
        params: of the whole weight.
        spec: its representation.
        shape: its shape, [..., O, I].
        columns: indices [n] along I.
    """
    rows, width = shape[-2:]
    step_r, step_c = spec.granularity.region(rows, width)
    groups = columns // step_c

    def spread(x: Tensor) -> Tensor:
        wide = x.index_select(-1, groups)
        return wide if step_r == 1 else wide.repeat_interleave(step_r, dim=-2)

    return map_groups(params, spread)


def map_groups(params: Params, change: Callable[[Tensor], Tensor]) -> Params:
    """Return parameters with `change` applied to every tensor that has one value per group."""
    same = params.scale.shape
    extra = {k: change(v) if v.shape == same else v for k, v in params.extra.items()}
    zero = params.zero_point
    return Params(change(params.scale), None if zero is None else change(zero), extra)


def nearest(values: Tensor, spec: TensorSpec, params: Params, *, kind: DataType) -> Tensor:
    """Return the representable values nearest to `values`, float32, no gradients.

    Args:
        values: wanted values, any shape.
        spec: representation of the weight they belong to.
        params: one value per element (`column_params`).
        kind: the data type.
    """
    if isinstance(kind, Columnwise):
        return kind.nearest(values, spec, params)
    with torch.no_grad():
        flat = map_groups(params, lambda x: x.reshape(-1, 1))
        alone = spec.with_(granularity=_ALONE)
        return kind.fake_quant(values.reshape(-1, 1), alone, flat).reshape(values.shape)


def params_of(weight: QuantizedWeight, *, kind: DataType) -> Params | None:
    """Return the parameters a weight was quantized with; None where they cannot be recovered."""
    if isinstance(kind, Columnwise):
        return kind.params_of(weight)
    zero = weight.zero_point
    guess = Params(
        weight.scale.float(),
        None if zero is None else zero.float(),
        {k: v.float() for k, v in weight.extra.items()},
    )
    again = kind.quantize(kind.dequantize(weight), weight.spec, guess)
    return guess if equal(replace(again, extra=weight.extra), weight) else None
