"""Dense: dequantizes once, when the layer is prepared, and multiplies in floating point.

On CPU about 40 times faster per call than dequantizing each time; takes the memory of the float
weight. The codes are gone: a layer keeps its checkpoint tensors beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

from ar_kernels.backends.base import PackedWeight
from ar_kernels.backends.reference import refuses_weight_only
from ar_kernels.backends.support import Support

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.backends.base import Need
    from ar_kernels.weight import QuantizedWeight


class Dense:
    """Holds the dequantized weight [O, I] in the type of the activations."""

    name = "dense"
    priority = 10
    status = "verified on cpu, untried elsewhere"
    support = Support()
    keeps_codes = False

    def missing(self) -> str | None:
        """Return None: it needs torch only."""
        return None

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        return refuses_weight_only(need)

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return the weight dequantized to the need's type on its device."""
        return PackedWeight({"weight": weight.to(need.device).dequantize(need.dtype).contiguous()})

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        return ("weight",)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
        weight = packed.buffers["weight"].to(x.dtype)
        return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
