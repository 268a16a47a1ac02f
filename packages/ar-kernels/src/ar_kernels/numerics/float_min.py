"""Integers with a float minimum (GGUF Q4_1 and Q5_1): weight = scale * code + minimum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.affine import AffineFakeQuant, affine_nearest, divisor
from ar_kernels.numerics.base import Params
from ar_kernels.numerics.checks import require_finite
from ar_kernels.numerics.grouping import expand, grouped, ungrouped
from ar_kernels.numerics.k_search import affine_fit
from ar_kernels.numerics.rounding import floored, stored
from ar_kernels.weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_schemes import TensorSpec


class FloatMinimum:
    """Data type `int_asym_float_zp`."""

    name = "int_asym_float_zp"

    def refuses(self, spec: TensorSpec) -> str | None:
        """Return why a spec cannot be computed, or None."""
        if not 2 <= spec.bits <= 8:
            return f"{self.name} has 2 to 8 bits, not {spec.bits}"
        return f"{self.name} has a minimum; it cannot be symmetric" if spec.symmetric else None

    def shared(self, weights: Sequence[Tensor], spec: TensorSpec) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the parameters that members of a fused group have in common: none."""
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
        """Return scales and minima from the smallest and largest value of each group."""
        groups = grouped(weight.float(), spec.granularity)
        smallest, largest = groups.amin(-1), groups.amax(-1)
        smallest = smallest if low is None else smallest * low
        largest = largest if high is None else largest * high
        return _params((largest - smallest) / (2**spec.bits - 1), smallest, spec)

    def rescale(self, params: Params, spec: TensorSpec, factor: Tensor) -> Params:
        """Return parameters with every scale times `factor`, rounded as stored."""
        return Params(stored(floored(params.scale * factor), spec), extra=params.extra)

    def quantize(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> QuantizedWeight:
        """Return the codes for a weight; `offset` [..., O, I] is added before rounding.

        Raises:
            KernelError: the weight or a scale is not finite.
        """
        require_finite(weight, spec, params)
        dtype = getattr(torch, spec.scale_dtype)
        minimum = params.extra["minimum"].detach()
        with torch.no_grad():
            groups = grouped(weight.float(), spec.granularity)
            steps = (groups - minimum.unsqueeze(-1)) / divisor(params.scale).unsqueeze(-1)
            if offset is not None:
                steps = steps + grouped(offset, spec.granularity)
            codes = steps.round_().clamp_(0, 2**spec.bits - 1).to(torch.uint8)
        return QuantizedWeight(
            spec=spec,
            codes=ungrouped(codes, tuple(weight.shape), spec.granularity).contiguous(),
            scale=params.scale.detach().to(dtype),
            extra={"minimum": minimum.to(dtype)},
        )

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        """Return the float32 weight: scale * code + minimum."""
        where = weight.spec.granularity
        scale = expand(weight.scale.float(), weight.shape, where)
        return weight.codes.float() * scale + expand(
            weight.extra["minimum"].float(), weight.shape, where
        )

    def fake_quant(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> Tensor:
        """Return quantize + dequantize, float32, straight-through gradients."""
        fake: Tensor = AffineFakeQuant.apply(
            grouped(weight.float(), spec.granularity),
            params.scale.unsqueeze(-1),
            params.extra["minimum"].unsqueeze(-1),
            None if offset is None else grouped(offset, spec.granularity),
            0,
            2**spec.bits - 1,
        )
        return ungrouped(fake, tuple(weight.shape), spec.granularity)

    def nearest(self, values: Tensor, spec: TensorSpec, params: Params) -> Tensor:
        """Return the representable values nearest to `values`; see `Columnwise`."""
        return affine_nearest(values, params, 0, 2**spec.bits - 1)

    def params_of(self, weight: QuantizedWeight) -> Params:
        """Return the parameters a weight was quantized with; see `Columnwise`."""
        return Params(weight.scale.float(), extra={"minimum": weight.extra["minimum"].float()})

    def search(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> Params:
        """Return scales and minima of least weighted squared error, per group."""
        groups = grouped(weight.float(), spec.granularity)
        weights = torch.ones_like(groups)
        if importance is not None:
            weights = grouped(importance.float().expand(weight.shape), spec.granularity)
        top = 2**spec.bits - 1
        plain = self.parameters(weight, spec)
        found = _params(*affine_fit(groups, weights, top, signed=True), spec)
        better = _error(groups, weights, found, top) < _error(groups, weights, plain, top)
        return Params(
            torch.where(better, found.scale, plain.scale),
            extra={"minimum": torch.where(better, found.extra["minimum"], plain.extra["minimum"])},
        )


def _params(scale: Tensor, minimum: Tensor, spec: TensorSpec) -> Params:
    return Params(stored(floored(scale), spec), extra={"minimum": stored(minimum, spec)})


def _error(groups: Tensor, weights: Tensor, params: Params, top: int) -> Tensor:
    scale, minimum = params.scale.unsqueeze(-1), params.extra["minimum"].unsqueeze(-1)
    codes = ((groups - minimum) / scale).round_().clamp_(0, top)
    return ((codes * scale + minimum - groups).square_() * weights).sum(-1)
