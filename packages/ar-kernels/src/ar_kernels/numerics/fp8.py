"""FP8 (E4M3) with float scales: per tensor, channel, tile or token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.base import Params
from ar_kernels.numerics.elements import E4M3
from ar_kernels.numerics.floats import FloatType, peak, searched
from ar_kernels.numerics.rounding import stored

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_kernels.numerics.elements import Element
    from ar_kernels.weight import QuantizedWeight
    from ar_schemes import TensorSpec

SMALLEST = 1 / (E4M3.maximum * 512)
"""Least scale: keeps a region of zeros finite, and is what engines use."""
_FACTORS = (1.0, 0.8, 0.85, 0.9, 0.95)


class Fp8(FloatType):
    """Data type `fp`."""

    name = "fp"

    def element(self, spec: TensorSpec) -> Element:  # noqa: ARG002
        """Return the element of a spec."""
        return E4M3

    def refuses(self, spec: TensorSpec) -> str | None:
        """Return why a spec cannot be computed, or None."""
        if spec.bits != 8:  # noqa: PLR2004
            return f"fp has 8 bits (E4M3), not {spec.bits}"
        if not spec.symmetric:
            return "fp has no zero point; it cannot be asymmetric"
        if spec.scale_dtype not in ("float32", "bfloat16", "float16"):
            return f"fp has float scales, not {spec.scale_dtype}"
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
        """Return largest / 448 of each region."""
        return Params(_scale(peak(weight, spec, low, high) / E4M3.maximum, spec))

    def rescale(self, params: Params, spec: TensorSpec, factor: Tensor) -> Params:
        """Return parameters with every scale times `factor`, rounded as stored."""
        return Params(_scale(params.scale * factor, spec))

    def search(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> Params:
        """Return the best of some scales at and below largest / 448."""
        start = peak(weight, spec) / E4M3.maximum
        wanted = (_scale(start * f, spec) for f in _FACTORS)
        return Params(searched(weight, spec, E4M3, importance, wanted, lambda s: s))

    def to_stored(self, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scale: its values are those of the stored type already."""
        return params.scale, {}

    def quantize(
        self, weight: Tensor, spec: TensorSpec, params: Params, *, offset: Tensor | None = None
    ) -> QuantizedWeight:
        """Return the codes, the scale in its stored type."""
        from dataclasses import replace

        made = super().quantize(weight, spec, params, offset=offset)
        return replace(made, scale=made.scale.to(getattr(torch, spec.scale_dtype)))

    def step(self, weight: QuantizedWeight) -> Tensor:
        """Return the scale, float32."""
        return weight.scale.float()


def _scale(wanted: Tensor, spec: TensorSpec) -> Tensor:
    return stored(wanted.clamp_min(SMALLEST), spec)
