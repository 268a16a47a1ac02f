"""Habana's expansion of 4-bit weights on Gaudi, which its graph compiler fuses with the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.backends import four_bits
from ar_kernels.backends.base import PackedWeight
from ar_kernels.backends.four_bits import Parts
from ar_kernels.backends.probing import lacks, wrong_device
from ar_kernels.backends.support import Support

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.backends.base import Need
    from ar_kernels.weight import QuantizedWeight


class Hpu:
    """Integers of up to 4 bits, bfloat16; groups of any size."""

    name = "hpu"
    priority = 90
    status = "contract-tested with a stand-in for the operator, never run on Gaudi"
    keeps_codes = True

    def __init__(self, device: str = "hpu") -> None:
        """Take the device type; another than `hpu` where a stand-in is tested."""
        self.device = device
        self.support = Support(
            devices=(device,),
            dtypes=(torch.bfloat16,),
            widths={"int": (2, 3, 4)},
            spans=("group", "channel"),
        )

    def missing(self) -> str | None:
        """Return what this machine lacks for it, or None."""
        return lacks("habana_frameworks", package="habana_frameworks (Intel's Gaudi container)")

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        size = need.spec.granularity.region(need.rows, need.columns)[1]
        why = wrong_device(self.device, need.device) or four_bits.refuses(need, groups=(size,))
        if why is not None:
            return why
        if need.dtype != torch.bfloat16:
            return f"computes in bfloat16, not {need.dtype}"
        return "needs rows in multiples of 8" if need.rows % 8 else None

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return words [I, O / 8] (eight rows of the weight a word), zero points [G, O / 8]."""
        found = four_bits.parts(weight, need.spec.granularity.region(*weight.shape)[1])
        buffers = {
            "words": four_bits.words(found.codes.t()),
            "zero": four_bits.words(found.zero),
            **four_bits.with_scale(found.scale, need.dtype),
        }
        moved = {name: tensor.to(need.device) for name, tensor in buffers.items()}
        return PackedWeight(moved, (need.rows, len(buffers)))

    def unpack(self, packed: PackedWeight, need: Need) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`."""
        buffers = {name: tensor.cpu() for name, tensor in packed.buffers.items()}
        codes = four_bits.from_words(buffers["words"]).t().contiguous()
        scale = four_bits.stored_scale(buffers, need.spec)
        found = Parts(codes, scale, four_bits.from_words(buffers["zero"]))
        return four_bits.joined(found, need.spec).to(need.device)

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        return ("words", "zero", "scale", "stored_scale")[: meta[1]]

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
        buffers = packed.buffers
        dense = torch.ops.hpu.convert_from_uint4(
            buffers["words"], buffers["scale"], buffers["zero"], torch.bfloat16
        )
        out = torch.matmul(x.to(torch.bfloat16), dense)
        return (out if bias is None else out + bias.to(out.dtype)).to(x.dtype)
