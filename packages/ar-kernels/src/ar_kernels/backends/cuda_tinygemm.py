"""torch's own 4-bit product on NVIDIA GPUs, `_weight_int4pack_mm`: good for a few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.backends import four_bits
from ar_kernels.backends.base import PackedWeight
from ar_kernels.backends.probing import capability, lacks_device, wrong_device
from ar_kernels.backends.support import Support

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.backends.base import Need
    from ar_kernels.weight import QuantizedWeight

_GROUPS = (32, 64, 128, 256)
_OLDEST = (8, 0)


class TinyGemm:
    """Integers of up to 4 bits, bfloat16; scales are rounded to bfloat16."""

    name = "cuda_tinygemm"
    priority = 50
    status = "contract-tested with a stand-in for the operator, never run on a GPU"
    keeps_codes = False

    def __init__(self, device: str = "cuda") -> None:
        """Take the device type; another than `cuda` where a stand-in is tested."""
        self.device = device
        self.support = Support(
            devices=(device,),
            dtypes=(torch.bfloat16,),
            widths={"int": (2, 3, 4)},
            spans=("group", "channel"),
            group_step=min(_GROUPS),
        )

    def missing(self) -> str | None:
        """Return what this machine lacks for it, or None."""
        return lacks_device(self.device)

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        why = wrong_device(self.device, need.device) or four_bits.refuses(need, groups=_GROUPS)
        if why is not None:
            return why
        if need.dtype != torch.bfloat16:
            return f"computes in bfloat16, not {need.dtype}"
        if need.rows % 8 or need.columns % 32:
            return "needs rows in multiples of 8 and columns in multiples of 32"
        found = capability(self.device)
        if found is not None and found < _OLDEST:
            return f"needs compute capability 8.0 or newer, the device has {found[0]}.{found[1]}"
        return None

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return the codes in the order of tensor cores, and pairs (scale, offset) [G, O, 2]."""
        group = four_bits.split_group(need.spec, need.columns, _GROUPS)
        assert group is not None
        found = four_bits.parts(weight.to(need.device), group)
        # the operator computes (code - 8) * scale + offset, both in bfloat16: narrow codes move to
        # the middle, so that the offset, and what rounding it costs, is small
        lift = 8 - 2 ** (need.spec.bits - 1)
        codes, zero = found.codes + lift, found.zero + lift
        tiles = next(t for t in (8, 4, 2) if need.columns % (16 * t) == 0)
        # the operator wants the first code in the high half of a byte
        packed = torch.ops.aten._convert_weight_to_int4pack(  # noqa: SLF001
            (codes[:, 0::2] << 4 | codes[:, 1::2]).contiguous(), tiles
        )
        scale = found.scale.float()
        pairs = torch.stack([scale, (8 - zero.float()) * scale], -1)
        buffers = {"words": packed, "scale_and_offset": pairs.to(torch.bfloat16).contiguous()}
        return PackedWeight(buffers, (group, need.rows))

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        return ("words", "scale_and_offset")

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
        group, rows = packed.meta
        flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        if not flat.shape[0]:
            return x.new_empty((*x.shape[:-1], rows))
        out = torch.ops.aten._weight_int4pack_mm(  # noqa: SLF001
            flat, packed.buffers["words"], group, packed.buffers["scale_and_offset"]
        )
        out = out.reshape(*x.shape[:-1], rows)
        return (out if bias is None else out + bias.to(out.dtype)).to(x.dtype)
