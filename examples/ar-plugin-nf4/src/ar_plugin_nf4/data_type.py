"""Data type `nf4`: a group's weights are its largest magnitude times one of sixteen values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels import KernelError, QuantizedWeight
from ar_kernels.numerics import Params, expand, grouped
from ar_plugin_nf4.codebook import TOP, codebook, position

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_schemes import TensorSpec

SMALLEST = 2.0**-20
"""Least scale: four bits above the smallest float16, and a group of zeros divides by it."""
_FACTORS = tuple(0.6 + 0.025 * i for i in range(25))
"""Fractions of the largest magnitude that `search` tries; 1 is among them."""


class NormalFloat4:
    """The arithmetic: scale float16 per group, code 0 .. 15 per weight."""

    name = "nf4"

    def refuses(self, spec: TensorSpec) -> str | None:
        """Return why a spec cannot be computed, or None."""
        if spec.bits != 4 or not spec.symmetric:  # noqa: PLR2004
            return f"nf4 has 4 bits and no zero point, not {spec}"
        if spec.scale_dtype != "float16":
            return f"nf4 has scales in float16, not {spec.scale_dtype}"
        if spec.super_group is not None:
            return "nf4 has one level of scales"
        return None

    def shared(self, weights: Sequence[Tensor], spec: TensorSpec) -> dict[str, Tensor]:  # noqa: ARG002
        """Return what members of a fused layer must have in common: nothing."""
        return {}

    def parameters(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        low: Tensor | None = None,
        high: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> Params:
        """Return the largest magnitude of each group, after clipping by `low` and `high`."""
        groups = grouped(weight.float(), spec.granularity)
        below, above = -groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        if low is not None:
            below = below * low
        if high is not None:
            above = above * high
        return Params(as_stored(torch.maximum(below, above)))

    def rescale(self, params: Params, spec: TensorSpec, factor: Tensor) -> Params:  # noqa: ARG002
        """Return parameters with every scale multiplied by `factor` and rounded as stored."""
        return Params(as_stored(params.scale * factor))

    def quantize(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> QuantizedWeight:
        """Return the codes of the nearest values; `offset` is added to positions before rounding.

        Raises:
            KernelError: the weight or a scale is not finite.
        """
        if not (torch.isfinite(weight).all() and torch.isfinite(params.scale).all()):
            msg = "the weight holds NaN, infinite or too large values and cannot be quantized"
            raise KernelError(msg)
        with torch.no_grad():
            scale = expand(params.scale, tuple(weight.shape), spec.granularity)
            place, _ = position(weight.float() / scale)
            codes = rounded(place, offset).clamp(0, TOP).to(torch.uint8)
        return QuantizedWeight(spec, codes, params.scale.detach().to(torch.float16))

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        """Return the float32 weight: scale times the value of the code."""
        values = codebook(weight.codes.device)[weight.codes.int()]
        return expand(weight.scale.float(), weight.shape, weight.spec.granularity) * values

    def fake_quant(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> Tensor:
        """Return quantize + dequantize, float32, straight-through gradients."""
        scale = expand(params.scale, tuple(weight.shape), spec.granularity)
        steps = weight.float() / scale
        with torch.no_grad():
            place, gap = position(steps)
            nearest = rounded(place, offset)
            codes = nearest.clamp(0, TOP)
            inside = codes == nearest
            values = codebook(weight.device)[codes.int()]
            held = scale.detach()
        # the second term is 0 and carries the gradients past the rounding, where nothing clamped
        passed = steps * held * inside
        if offset is not None:
            passed = passed + offset * (gap * held * inside)
        return scale * values + (passed - passed.detach())

    def search(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> Params:
        """Return, for each group, the fraction of its largest magnitude with the least error."""
        plain = self.parameters(weight, spec)
        best, least = plain.scale, self._error(weight, spec, plain, importance)
        for factor in _FACTORS:
            params = Params(as_stored(plain.scale * factor))
            error = self._error(weight, spec, params, importance)
            best = torch.where(error < least, params.scale, best)
            least = torch.minimum(error, least)
        return Params(best)

    def _error(
        self, weight: Tensor, spec: TensorSpec, params: Params, importance: Tensor | None
    ) -> Tensor:
        """Return the weighted squared error of each group, shape of the scale."""
        with torch.no_grad():
            error = (self.fake_quant(weight, spec, params) - weight.float()).square()
            if importance is not None:
                error = error * importance.float()
            return grouped(error, spec.granularity).sum(-1)


def rounded(place: Tensor, offset: Tensor | None) -> Tensor:
    """Return positions rounded to whole codes, half to even."""
    return (place if offset is None else place + offset).round()


def as_stored(scale: Tensor) -> Tensor:
    """Return a scale rounded to float16, never 0; the gradient passes as if nothing happened."""
    kept = scale.detach().clamp_min(SMALLEST).half().float()
    return _StraightThrough.apply(scale, kept)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG004 - autograd's signature
        return y.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None
