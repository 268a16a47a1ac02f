"""4-bit products of intel-extension-for-pytorch on Intel GPUs. Legacy: its development ended.

The extension ends the process when torch is of another version than it was built for, so nothing
is imported before both versions are known to agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.backends import four_bits
from ar_kernels.backends.base import PackedWeight
from ar_kernels.backends.four_bits import Parts
from ar_kernels.backends.probing import has_op, lacks_device, version, wrong_device
from ar_kernels.backends.support import Support

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.backends.base import Need
    from ar_kernels.weight import QuantizedWeight

_PACKAGE = "intel-extension-for-pytorch"
_SERIES = (2, 8)
"""The only version of both that is supported: the last one."""


class XpuIpex:
    """Symmetric 4-bit integers in half or bfloat16; only with torch 2.8 and the extension 2.8."""

    name = "xpu_ipex"
    priority = 40
    status = "contract-tested with a stand-in for the operator; legacy, never run on an XPU"
    keeps_codes = True

    def __init__(self, device: str = "xpu") -> None:
        """Take the device type; another than `xpu` where a stand-in is tested."""
        self.device = device
        self.support = Support(
            devices=(device,),
            dtypes=(torch.float16, torch.bfloat16),
            widths={"int": (4,)},
            spans=("group", "channel"),
            asymmetric=False,
        )

    def missing(self) -> str | None:
        """Return what this machine lacks for it, or None."""
        found = version(_PACKAGE)
        if found is None:
            return f"the package {_PACKAGE} 2.8 (legacy; torch has kernels of its own now)"
        built_for = tuple(int(n) for n in torch.__version__.split(".")[:2])
        if found[:2] != _SERIES or built_for != _SERIES:
            have = ".".join(map(str, found))
            return f"torch 2.8 with {_PACKAGE} 2.8, here are {torch.__version__} and {have}"
        return lacks_device(self.device)

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        size = need.spec.granularity.region(need.rows, need.columns)[1]
        why = wrong_device(self.device, need.device)
        why = why or four_bits.refuses(need, groups=(size,), bits=(4,))
        if why is not None:
            return why
        if not need.spec.symmetric:
            return "multiplies symmetric integers only"
        if need.dtype not in (torch.float16, torch.bfloat16):
            return f"computes in float16 or bfloat16, not {need.dtype}"
        return "needs columns in multiples of 32" if need.columns % 32 else None

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return words [I / 8, O] column by column, scales [G, O] and the one zero point."""
        group = need.spec.granularity.region(need.rows, need.columns)[1]
        found = four_bits.parts(weight.to(need.device), group)
        buffers = {
            "words": four_bits.words(found.codes),
            "zero": torch.full((1,), 8, dtype=torch.int8, device=need.device),
            **four_bits.with_scale(found.scale, need.dtype),
        }
        return PackedWeight(buffers, (group, need.rows, len(buffers)))

    def unpack(self, packed: PackedWeight, need: Need) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`."""
        scale = four_bits.stored_scale(packed.buffers, need.spec)
        codes = four_bits.from_words(packed.buffers["words"])
        return four_bits.joined(Parts(codes, scale, torch.zeros_like(scale)), need.spec)

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        return ("words", "zero", "scale", "stored_scale")[: meta[2]]

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
        if not has_op("torch_ipex::mm_int4"):  # registered by importing the extension
            import intel_extension_for_pytorch  # noqa: F401
        group, rows, _ = packed.meta
        buffers = packed.buffers
        flat = x.reshape(-1, x.shape[-1]).to(buffers["scale"].dtype).contiguous()
        if not flat.shape[0]:
            return x.new_empty((*x.shape[:-1], rows))
        words = buffers["words"].t()
        out = torch.ops.torch_ipex.mm_int4(
            flat, words, buffers["scale"], buffers["zero"], group, None
        )
        out = out.reshape(*x.shape[:-1], rows)
        return (out if bias is None else out + bias.to(out.dtype)).to(x.dtype)
