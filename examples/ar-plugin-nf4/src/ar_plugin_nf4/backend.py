"""Backend `nf4_lookup`: keeps packed codes and looks two weights up for every byte.

One table of 256 pairs of values takes the place of unpacking: a byte indexes both of its weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from ar_kernels import QuantizedWeight
from ar_kernels.backends import PackedWeight
from ar_plugin_nf4.codebook import codebook
from ar_plugin_nf4.data_type import NormalFloat4
from ar_plugin_nf4.layout import Nf4Layout, halves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.backends import Need


class Nf4Lookup:
    """Weights at half a byte each, dequantized on every call."""

    name = "nf4_lookup"
    priority = 20
    status = "verified on cpu, untried elsewhere"
    keeps_codes = True

    def missing(self) -> str | None:
        """Return None: it needs torch only."""
        return None

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        if need.activation is not None:
            return f"activations are not quantized here, the layer asks for {need.activation}"
        if not need.dtype.is_floating_point or need.dtype.itemsize < 2:  # noqa: PLR2004
            return f"activations must be float of 16 bits or more, not {need.dtype}"
        if need.spec.data_type != "nf4":
            return f"only nf4, not {need.spec.data_type}"
        why = NormalFloat4().refuses(need.spec)
        return why or Nf4Layout().refuses(need.spec, need.rows, need.columns)

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return the packed codes, the scales, and the table of pairs."""
        packed = Nf4Layout().pack(weight.to(need.device))
        return PackedWeight({**packed, "pairs": pairs(packed["codes"].device)})

    def unpack(self, packed: PackedWeight, need: Need) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`."""
        codes = halves(packed.buffers["codes"])
        return QuantizedWeight(need.spec, codes, packed.buffers["absmax"])

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of the buffers of a packed weight, in order."""
        return ("codes", "absmax", "pairs")

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
        codes, scale, table = packed.buffers.values()
        values = table[codes.int()].flatten(-2)
        rows, columns = values.shape
        wide = scale.float().repeat_interleave(columns // scale.shape[1], -1)
        weight = (wide.repeat_interleave(rows // scale.shape[0], -2) * values).to(x.dtype)
        return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def pairs(device: torch.device) -> Tensor:
    """Return the two values of every byte, float32 [256, 2]."""
    values = codebook(device)
    byte = torch.arange(256, device=device)
    return torch.stack([values[byte & 15], values[byte >> 4]], -1)
