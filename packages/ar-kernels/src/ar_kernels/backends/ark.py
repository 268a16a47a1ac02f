"""auto-round-lib's kernels (`auto_round_kernel`) on CPUs and Intel GPUs, where it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.backends import four_bits
from ar_kernels.backends.base import PackedWeight
from ar_kernels.backends.four_bits import Parts
from ar_kernels.backends.probing import lacks, lacks_device, wrong_device
from ar_kernels.backends.support import Support

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.backends.base import Need
    from ar_kernels.weight import QuantizedWeight


@dataclass(frozen=True)
class Ark:
    """Integers of 2 to 8 bits in one opaque block of bytes; scales are kept beside it.

    Attributes:
        name: identifier.
        device: torch device type.
        priority: static rank.
        status: how far it was tried.
        compute: type of the products. On CPUs float32: left to itself the library quantizes
            activations to 8 bits on Intel CPUs, which nobody asked for here.
        scale: type of scales and activations inside.
        bits: widths it takes.
        asymmetric: whether it takes zero points.
        keeps_codes: the codes can be read back.
        install: what to type where the library is missing.
    """

    name: str
    device: str
    priority: int
    status: str
    compute: str
    scale: str
    bits: tuple[int, ...]
    asymmetric: bool
    keeps_codes: bool = True
    install: str = "pip install auto-round-lib"

    @property
    def support(self) -> Support:
        """What it supports, as data."""
        return Support(
            devices=(self.device,),
            dtypes=(torch.float16, torch.bfloat16, torch.float32),
            widths={"int": self.bits},
            spans=("group", "channel"),
            asymmetric=self.asymmetric,
        )

    def missing(self) -> str | None:
        """Return what this machine lacks for it, or None."""
        found = lacks("auto_round_kernel", package="auto-round-lib")
        return found or lacks_device(self.device)

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        size = need.spec.granularity.region(need.rows, need.columns)[1]
        why = wrong_device(self.device, need.device)
        why = why or four_bits.refuses(need, groups=(size,), bits=self.bits)
        if why is None and not need.spec.symmetric and not self.asymmetric:
            why = f"multiplies symmetric integers only on {self.device}"
        if why is None and need.dtype == torch.float64:
            why = "computes in float32 at most"
        return why

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return the library's block, and the scales and zero points [G, O] it was made from."""
        spec = need.spec
        group = spec.granularity.region(need.rows, need.columns)[1]
        found = four_bits.parts(weight.to(need.device), group)
        half = 2 ** (spec.bits - 1)
        codes, zero = ((t.int() - half).to(torch.int8) for t in (found.codes.t(), found.zero))
        asymmetric = not spec.symmetric
        inside = found.scale.to(_TORCH[self.scale]).contiguous()
        block = _library().repack_quantized_weight(
            codes.contiguous(),
            inside,
            zero.contiguous(),
            *(group, self.compute, f"int{spec.bits}", self.scale, asymmetric),
        )
        buffers = {"block": block, "scale": found.scale}
        if asymmetric:
            buffers["zero"] = found.zero
        return PackedWeight(buffers, (need.rows, need.columns, group, spec.bits, int(asymmetric)))

    def unpack(self, packed: PackedWeight, need: Need) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`."""
        rows, columns, group, bits, asymmetric = packed.meta
        buffers = packed.buffers
        weight = _library().unpack_weight(
            buffers["block"], _TORCH[self.scale], rows, columns, *self._how(group, bits, asymmetric)
        )
        inside = buffers["scale"].to(_TORCH[self.scale]).float().t().repeat_interleave(group, 1)
        steps = (weight.float() / inside).round_()
        zero = buffers.get("zero")
        if zero is None:
            zero = torch.full_like(buffers["scale"], 2 ** (bits - 1), dtype=torch.uint8)
        codes = steps + zero.float().t().repeat_interleave(group, 1)
        found = Parts(codes.to(torch.uint8).contiguous(), buffers["scale"], zero)
        return four_bits.joined(found, need.spec)

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        return ("block", "scale", "zero") if meta[4] else ("block", "scale")

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
        rows, columns, group, bits, asymmetric = packed.meta
        inside = _TORCH[self.scale]
        flat = x.reshape(-1, columns).to(inside).contiguous()
        if not flat.shape[0]:
            return x.new_empty((*x.shape[:-1], rows))
        added = x.new_empty(0, dtype=inside) if bias is None else bias.to(inside)
        out: Tensor = _library().woqgemm(
            flat,
            packed.buffers["block"],
            added,
            *(rows, columns, *self._how(group, bits, asymmetric)),
        )
        return out.to(x.dtype).reshape(*x.shape[:-1], rows)

    def _how(self, group: int, bits: int, asymmetric: int) -> tuple[int, str, str, str, bool]:
        return group, self.compute, f"int{bits}", self.scale, bool(asymmetric)


def _library() -> Any:
    import auto_round_kernel

    return auto_round_kernel


_TORCH = {"fp32": torch.float32, "fp16": torch.float16}
ARK = Ark(
    "ark",
    "cpu",
    55,
    "verified with auto-round-lib 0.16.0 on an AMD CPU",
    "fp32",
    "fp32",
    (2, 3, 4, 5, 6, 7, 8),
    True,
)
ARK_XPU = Ark(
    "ark_xpu",
    "xpu",
    85,
    "contract-tested with a stand-in for the library, never run on an XPU; activations in 8 bits",
    "int8",
    "fp16",
    (4, 8),
    False,
)
