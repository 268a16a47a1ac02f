"""torch's own 4-bit product on Intel GPUs, oneDNN's `_weight_int4pack_mm_with_scales_and_zeros`.

Not the older `_weight_int4pack_mm`, which gave wrong results for one token on XPU
(torch-xpu-ops issue 4765).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.backends import four_bits
from ar_kernels.backends.base import PackedWeight
from ar_kernels.backends.four_bits import Parts
from ar_kernels.backends.probing import has_op, lacks_device, wrong_device
from ar_kernels.backends.support import Support

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.backends.base import Need
    from ar_kernels.weight import QuantizedWeight

_GROUP = 32
_OP = "_weight_int4pack_mm_with_scales_and_zeros"


class XpuOneDnn:
    """Integers of up to 4 bits, groups of any multiple of 32."""

    name = "xpu_onednn"
    priority = 90
    status = "contract-tested with a stand-in for the operator, never run on an XPU"
    keeps_codes = True

    def __init__(self, device: str = "xpu") -> None:
        """Take the device type; another than `xpu` where a stand-in is tested."""
        self.device = device
        self.support = Support(
            devices=(device,),
            dtypes=(torch.float16, torch.bfloat16, torch.float32),
            widths={"int": (2, 3, 4)},
            spans=("group", "channel"),
            group_step=_GROUP,
        )

    def missing(self) -> str | None:
        """Return what this machine lacks for it, or None."""
        if not has_op(f"aten::{_OP}"):
            return f"a torch with {_OP} (2.8 or newer)"
        return lacks_device(self.device)

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        why = wrong_device(self.device, need.device)
        why = why or four_bits.refuses(need, groups=_known(need))
        if why is None and need.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            why = f"no product for {need.dtype} activations"
        return why

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return words [O, I / 8], scales in the activations' type and zero points [G, O]."""
        group = four_bits.split_group(need.spec, need.columns, _known(need))
        assert group is not None
        found = four_bits.parts(weight.to(need.device), group)
        words = torch.ops.aten._convert_weight_to_int4pack(  # noqa: SLF001
            four_bits.nibbles(found.codes), 8
        )
        buffers = {"words": words, "zero": found.zero.to(torch.int8)}
        buffers |= four_bits.with_scale(found.scale, need.dtype)
        return PackedWeight(buffers, (group, need.rows, len(buffers)))

    def unpack(self, packed: PackedWeight, need: Need) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`."""
        buffers = packed.buffers
        codes = four_bits.from_words(buffers["words"])
        scale = four_bits.stored_scale(buffers, need.spec)
        return four_bits.joined(Parts(codes, scale, buffers["zero"].to(torch.uint8)), need.spec)

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        return ("words", "zero", "scale", "stored_scale")[: meta[2]]

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
        group, rows, _ = packed.meta
        buffers = packed.buffers
        flat = x.reshape(-1, x.shape[-1]).to(buffers["scale"].dtype).contiguous()
        if not flat.shape[0]:
            return x.new_empty((*x.shape[:-1], rows))
        op = getattr(torch.ops.aten, _OP)
        out = op(flat, buffers["words"], group, buffers["scale"], buffers["zero"])
        out = out.reshape(*x.shape[:-1], rows)
        return (out if bias is None else out + bias.to(out.dtype)).to(x.dtype)


def _known(need: Need) -> tuple[int, ...]:
    """Return the group sizes the operator takes for a layer: its own, if a multiple of 32."""
    size = need.spec.granularity.region(1, need.columns)[1]
    return (size,) if size % _GROUP == 0 else (_GROUP,)
