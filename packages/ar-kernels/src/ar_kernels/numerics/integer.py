"""Integers of 1 to 8 bits, symmetric over the full range or asymmetric with a zero point.

Symmetric (SignRound, arXiv 2309.05516, as shipped by AutoRound): with Q = 2**(bits-1) the codes
are -Q .. Q-1 and the element of largest magnitude maps to -Q, so the scale is negative where that
element is positive. Stored codes are code + Q, the zero point is Q for every group.
Asymmetric: codes 0 .. 2**bits - 1, zero point an integer code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.base import Params
from ar_kernels.numerics.checks import require_finite
from ar_kernels.numerics.grouping import expand, grouped, ungrouped
from ar_kernels.numerics.integer_fake_quant import IntegerFakeQuant
from ar_kernels.numerics.integer_search import search_asymmetric, search_symmetric
from ar_kernels.numerics.rounding import floored, round_ste, stored
from ar_kernels.weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_schemes import TensorSpec


class Integer:
    """Data type `int`: uniform integers."""

    name = "int"

    def refuses(self, spec: TensorSpec) -> str | None:
        """Return why a spec cannot be computed, or None."""
        if not 1 < spec.bits <= 8:
            return f"int has 2 to 8 bits, not {spec.bits}"
        return None

    def parameters(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        low: Tensor | None = None,
        high: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> Params:
        """Return scales (and zero points) from the smallest and largest value of each group."""
        smallest, largest = extremes(weight, spec)
        return self.from_extremes(smallest, largest, spec, low=low, high=high)

    def from_extremes(
        self,
        smallest: Tensor,
        largest: Tensor,
        spec: TensorSpec,
        *,
        low: Tensor | None = None,
        high: Tensor | None = None,
    ) -> Params:
        """Return parameters from `extremes(weight, spec)`, which a loop computes only once."""
        if low is not None:
            smallest = smallest * low
        if high is not None:
            largest = largest * high
        if spec.symmetric:
            below = -smallest
            peak = torch.where(largest >= below, -largest, below)
            return Params(scale=stored(floored(peak / 2 ** (spec.bits - 1)), spec))
        top = 2**spec.bits - 1
        scale = stored(floored((largest - smallest) / top), spec)
        return Params(scale=scale, zero_point=round_ste(-smallest / scale).clamp(0, top))

    def rescale(self, params: Params, spec: TensorSpec, factor: Tensor) -> Params:
        """Return parameters with every scale multiplied by `factor` and rounded as stored."""
        return Params(stored(floored(params.scale * factor), spec), params.zero_point)

    def quantize(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> QuantizedWeight:
        """Return the codes for a weight; `offset` [..., O, I] is added before rounding.

        Raises:
            KernelError: the weight or a scale is not finite.
        """
        require_finite(weight, spec, params)
        with torch.no_grad():
            codes, zero = self._codes(weight.float(), spec, params, offset)
        zero_point = None if params.zero_point is None else params.zero_point.detach()
        return QuantizedWeight(
            spec=spec,
            codes=(codes + zero).to(torch.uint8),
            scale=params.scale.detach().to(getattr(torch, spec.scale_dtype)),
            zero_point=None if zero_point is None else zero_point.to(torch.uint8),
        )

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        """Return the float32 weight: scale * (code - zero point)."""
        spec, shape = weight.spec, weight.shape
        scale = expand(weight.scale.float(), shape, spec.granularity)
        if weight.zero_point is None:
            return scale * (weight.codes.float() - 2 ** (spec.bits - 1))
        return scale * (
            weight.codes.float() - expand(weight.zero_point.float(), shape, spec.granularity)
        )

    def fake_quant(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> Tensor:
        """Return quantize + dequantize, float32, straight-through gradients."""
        zero = params.zero_point
        fake = IntegerFakeQuant.apply(
            grouped(weight.float(), spec.granularity),
            params.scale.unsqueeze(-1),
            None if zero is None else zero.unsqueeze(-1),
            None if offset is None else grouped(offset, spec.granularity),
            spec.bits,
        )
        return ungrouped(fake, tuple(weight.shape), spec.granularity)

    def nearest(self, values: Tensor, spec: TensorSpec, params: Params) -> Tensor:
        """Return the representable values nearest to `values`; see `Columnwise`."""
        codes = (values / params.scale).round_()
        if params.zero_point is None:
            peak = 2 ** (spec.bits - 1)
            codes.clamp_(-peak, peak - 1)
        else:
            codes.add_(params.zero_point).clamp_(0, 2**spec.bits - 1).sub_(params.zero_point)
        return codes.mul_(params.scale)

    def params_of(self, weight: QuantizedWeight) -> Params:
        """Return the parameters a weight was quantized with; see `Columnwise`."""
        zero = weight.zero_point
        return Params(weight.scale.float(), None if zero is None else zero.float())

    def shared(self, weights: Sequence[Tensor], spec: TensorSpec) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the parameters that members of a fused group have in common: none."""
        return {}

    def search(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> Params:
        """Return searched parameters: a grid of scales, then least squares, per group."""
        groups = grouped(weight.float(), spec.granularity)
        weights = None
        if importance is not None:
            weights = grouped(importance.float().expand(weight.shape), spec.granularity)
        if spec.symmetric:
            return Params(scale=search_symmetric(groups, spec, weights))
        scale, zero = search_asymmetric(groups, spec, weights)
        return Params(scale=scale, zero_point=zero)

    def _codes(
        self, weight: Tensor, spec: TensorSpec, params: Params, offset: Tensor | None
    ) -> tuple[Tensor, Tensor | float]:
        """Return (code - zero point, zero point), both broadcast to the weight."""
        shape = tuple(weight.shape)
        steps = weight / expand(params.scale, shape, spec.granularity)
        rounded = round_ste(steps if offset is None else steps + offset)
        if params.zero_point is None:
            peak = 2 ** (spec.bits - 1)
            return rounded.clamp(-peak, peak - 1), float(peak)
        zero = expand(params.zero_point, shape, spec.granularity)
        return (rounded + zero).clamp(0, 2**spec.bits - 1) - zero, zero


def extremes(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Return (smallest, largest) value per group, each with 0 included, float32 [..., R, G]."""
    groups = grouped(weight.float(), spec.granularity)
    return groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
