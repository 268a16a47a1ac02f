"""NVFP4: blocks of 16 E2M1 elements with an 8-bit float scale.

`nv_fp` scales the tensor by one float32 first (448 * 6 / largest), so that block scales fit E4M3;
layers that an engine fuses share it. `nvfp4_v2` has unsigned E5M3 block scales, whose range makes
the second level unnecessary. `nv_fp4_with_static_gs` is `nv_fp` for activations whose tensor scale
was collected beforehand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.base import Params
from ar_kernels.numerics.elements import E2M1, E4M3, UE5M3
from ar_kernels.numerics.floats import FloatType, given, peak, searched
from ar_kernels.numerics.rounding import round_to

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from ar_kernels.numerics.elements import Element, FloatElement
    from ar_kernels.weight import QuantizedWeight
    from ar_schemes import TensorSpec

RANGE = E4M3.maximum * E2M1.maximum
_SMALLEST = {"e4m3": 2.0**-9, "ue5m3": 2.0**-17}
"""Least positive block scale: keeps a block of zeros finite."""
_REACH = (0, *(sign * k for k in range(1, 7) for sign in (-1, 1)))
"""Block scales to try, counted in values of their type from that of the largest element: 0.6 to
1.7 times it, so that the largest element may become 4 as well as 6 (arXiv 2512.02010)."""


def global_scale(largest: Tensor) -> Tensor:
    """Return 448 * 6 / largest as float32, 1 where all is zero."""
    largest = largest.float()
    # far below what a checkpoint holds, the quotient would overflow
    safe = torch.where(largest > RANGE / torch.finfo(torch.float32).max, largest, RANGE)
    return RANGE / safe


class NvFp4(FloatType):
    """Data types `nv_fp` and `nv_fp4_with_static_gs`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def element(self, spec: TensorSpec) -> Element:  # noqa: ARG002
        """Return the element of a spec."""
        return E2M1

    def refuses(self, spec: TensorSpec) -> str | None:
        """Return why a spec cannot be computed, or None."""
        return _refusal(self.name, spec, "float8_e4m3fn")

    def shared(self, weights: Sequence[Tensor], spec: TensorSpec) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensor scale that fused layers have in common: that of the largest weight."""
        return {"global_scale": torch.stack([_own(weight) for weight in weights]).amin(0)}

    def parameters(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        low: Tensor | None = None,
        high: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> Params:
        """Return block scales (divided by the tensor scale) and the tensor scale."""
        whole = given(shared, "global_scale")
        whole = _own(weight) if whole is None else whole.float()
        wanted = peak(weight, spec, low, high) * whole / E2M1.maximum
        return _params(_block(wanted), whole)

    def rescale(self, params: Params, spec: TensorSpec, factor: Tensor) -> Params:  # noqa: ARG002
        """Return parameters with every block scale times `factor`, rounded to E4M3."""
        wanted = params.extra["block_scale"] * factor
        return _params(_block(wanted), params.extra["global_scale"])

    def search(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> Params:
        """Return the best of the block scales around that of the largest element."""
        plain = self.parameters(weight, spec, shared=shared)
        whole, around = plain.extra["global_scale"], _around(plain.extra["block_scale"], E4M3)
        best = searched(weight, spec, E2M1, importance, around, lambda b: b / whole)
        return _params(best, whole)

    def to_stored(self, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the block scales as E4M3, and the tensor scale."""
        block = params.extra["block_scale"].to(torch.float8_e4m3fn)
        # a copy: fused layers must not share storage in files
        return block, {"global_scale": params.extra["global_scale"].clone()}

    def step(self, weight: QuantizedWeight) -> Tensor:
        """Return block scale / tensor scale, float32."""
        return weight.scale.float() / weight.extra["global_scale"]

    def params_of(self, weight: QuantizedWeight) -> Params:
        """Return the parameters a weight was quantized with; see `Columnwise`."""
        return _params(weight.scale.float(), weight.extra["global_scale"])


class NvFp4E5M3(FloatType):
    """Data type `nvfp4_v2`: block scales are bits of an unsigned E5M3, no tensor scale."""

    name = "nvfp4_v2"

    def element(self, spec: TensorSpec) -> Element:  # noqa: ARG002
        """Return the element of a spec."""
        return E2M1

    def refuses(self, spec: TensorSpec) -> str | None:
        """Return why a spec cannot be computed, or None."""
        return _refusal(self.name, spec, "ue5m3")

    def parameters(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        low: Tensor | None = None,
        high: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> Params:
        """Return the block scales."""
        return Params(_unsigned(peak(weight, spec, low, high) / E2M1.maximum))

    def rescale(self, params: Params, spec: TensorSpec, factor: Tensor) -> Params:  # noqa: ARG002
        """Return parameters with every block scale times `factor`, rounded to E5M3."""
        return Params(_unsigned(params.scale * factor))

    def search(
        self,
        weight: Tensor,
        spec: TensorSpec,
        *,
        importance: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> Params:
        """Return the best of the block scales around that of the largest element."""
        around = _around(self.parameters(weight, spec).scale, UE5M3)
        return Params(searched(weight, spec, E2M1, importance, around, lambda s: s))

    def to_stored(self, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the bits of the block scales."""
        return UE5M3.encode(params.scale), {}

    def step(self, weight: QuantizedWeight) -> Tensor:
        """Return the block scales, float32."""
        return UE5M3.decode(weight.scale)


def _own(weight: Tensor) -> Tensor:
    return global_scale(weight.detach().float().abs().amax((-2, -1), keepdim=True))


def _block(wanted: Tensor) -> Tensor:
    return round_to(wanted.clamp(_SMALLEST["e4m3"], E4M3.maximum), E4M3)


def _unsigned(wanted: Tensor) -> Tensor:
    return round_to(wanted.clamp(_SMALLEST["ue5m3"], UE5M3.maximum), UE5M3)


def _around(block: Tensor, element: FloatElement) -> Iterator[Tensor]:
    """Yield positive values of an element some places above and below, the values first."""
    codes = element.encode(block).int()
    last = int(element.encode(torch.tensor(element.maximum)))
    for step in _REACH:
        yield element.decode((codes + step).clamp(1, last).to(torch.uint8))


def _params(block: Tensor, whole: Tensor) -> Params:
    return Params(block / whole, extra={"block_scale": block, "global_scale": whole})


def _refusal(name: str, spec: TensorSpec, scale: str) -> str | None:
    if spec.bits != 4:  # noqa: PLR2004
        return f"{name} has 4 bits, not {spec.bits}"
    if not spec.symmetric:
        return f"{name} has no zero point; it cannot be asymmetric"
    if spec.scale_dtype != scale:
        return f"{name} has {scale} scales, not {spec.scale_dtype}"
    return None
