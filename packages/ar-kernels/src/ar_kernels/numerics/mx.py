"""Microscaling types: blocks of 32 small elements that share a power of two.

OCP Microscaling Formats 1.0, section 6.3: exponent = floor(log2(largest)) - that of the element's
largest value, so up to one binade saturates. `mx_fp_rceil` rounds the exponent up: nothing does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.numerics.base import Params
from ar_kernels.numerics.elements import E2M1, E2M3, E4M3, INT4
from ar_kernels.numerics.floats import FloatType, peak, searched

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_kernels.numerics.elements import Element
    from ar_kernels.weight import QuantizedWeight
    from ar_schemes import TensorSpec

_LOWEST, _HIGHEST = -127, 127
"""Exponents that an E8M0 byte holds."""
_ELEMENTS: dict[str, dict[int, Element]] = {
    "mx_fp": {4: E2M1, 6: E2M3, 8: E4M3},
    "mx_fp_rceil": {4: E2M1, 6: E2M3, 8: E4M3},
    "mx_int": {4: INT4},
}


class _PowerOfTwo(torch.autograd.Function):
    """2**exponent from a positive tensor; the gradient passes as if it were proportional."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: float, mode: str) -> Tensor:
        # divided by a power of two, the smallest numbers would vanish: subtracted instead
        mantissa, exponent = torch.frexp(x if mode == "floor" else x / shift)
        if mode == "ceil":
            exponent = exponent - (mantissa == 0.5).int()  # noqa: PLR2004 - an exact power of two
        elif mode == "nearest":
            exponent = exponent - (mantissa < 2**-0.5).int()
        else:
            exponent = exponent - 1 - int(shift)
        one = torch.ones_like(x)
        power = torch.ldexp(one, exponent.clamp(_LOWEST, _HIGHEST))
        out = torch.where(x > 0, power, one)  # any scale will do for a block of zeros
        ctx.save_for_backward(torch.where(x > 0, out / x, torch.zeros_like(out)))
        return torch.where(x.isfinite(), out, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ratio,) = ctx.saved_tensors
        return grad * ratio, None, None


class Microscaling(FloatType):
    """Data types `mx_fp`, `mx_fp_rceil` and `mx_int`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def element(self, spec: TensorSpec) -> Element:
        """Return the element of a spec."""
        return _ELEMENTS[self.name][spec.bits]

    def refuses(self, spec: TensorSpec) -> str | None:
        """Return why a spec cannot be computed, or None."""
        widths = _ELEMENTS[self.name]
        if spec.bits not in widths:
            return f"{self.name} has {' or '.join(map(str, widths))} bits, not {spec.bits}"
        if not spec.symmetric:
            return f"{self.name} has no zero point; it cannot be asymmetric"
        if spec.scale_dtype != "e8m0":
            return f"{self.name} has e8m0 scales, not {spec.scale_dtype}"
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
        """Return the shared power of two of each block."""
        return Params(self.power(peak(weight, spec, low, high), spec))

    def power(self, largest: Tensor, spec: TensorSpec) -> Tensor:
        """Return the shared power of two of blocks with these largest magnitudes, float32."""
        element, up = self.element(spec), self.name == "mx_fp_rceil"
        shift = element.maximum if up else element.top_exponent
        made: Tensor = _PowerOfTwo.apply(largest, shift, "ceil" if up else "floor")
        return made

    def rescale(self, params: Params, spec: TensorSpec, factor: Tensor) -> Params:  # noqa: ARG002
        """Return parameters with every scale times `factor`, to the nearest power of two."""
        return Params(_PowerOfTwo.apply(params.scale * factor, 1.0, "nearest"))

    def search(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> Params:
        """Return the best of the exponent, the one below and the one above, per block."""
        plain = self.parameters(weight, spec).scale
        smallest, largest = 2.0**_LOWEST, 2.0**_HIGHEST
        candidates = [(plain * f).clamp(smallest, largest) for f in (1.0, 0.5, 2.0)]
        element = self.element(spec)
        return Params(searched(weight, spec, element, importance, candidates, lambda s: s))

    def to_stored(self, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scale as E8M0 and nothing else."""
        return params.scale.to(torch.float8_e8m0fnu), {}

    def step(self, weight: QuantizedWeight) -> Tensor:
        """Return the powers of two, float32."""
        return weight.scale.float()
