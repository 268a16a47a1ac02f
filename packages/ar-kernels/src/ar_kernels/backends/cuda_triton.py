"""Own Triton kernels for every weight-only type, on NVIDIA and AMD GPUs and on Intel's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels.backends.base import PackedWeight
from ar_kernels.backends.probing import lacks, lacks_device
from ar_kernels.backends.reference import refuses_weight_only
from ar_kernels.backends.support import Support
from ar_kernels.triton import packing as packings
from ar_kernels.triton.packing import Packing
from ar_kernels.triton.words import SLICE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.backends.base import Need
    from ar_kernels.weight import QuantizedWeight

_OLDEST = (8, 0)


@dataclass(frozen=True)
class TritonBackend:
    """Decodes in registers; a dense product of the expanded weight for many tokens.

    Attributes:
        name: identifier.
        device: torch device type.
        priority: static rank.
        status: how far it was tried.
        keeps_codes: the codes can be read back.
        install: what to type where Triton is missing.
    """

    name: str
    device: str
    priority: int
    status: str
    keeps_codes: bool = True
    install: str = "pip install triton"

    @property
    def support(self) -> Support:
        """What it supports, as data."""
        return Support(
            devices=(self.device,),
            dtypes=(torch.float16, torch.bfloat16, torch.float32),
            widths=packings.WIDTHS,
            group_step=SLICE,
        )

    def missing(self) -> str | None:
        """Return what this machine lacks for it, or None."""
        return lacks("triton") or (None if interpreting() else lacks_device(self.device))

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        if need.device != self.device and not (need.device == "cpu" and interpreting()):
            return f"runs on {self.device}, the layer is on {need.device}"
        why = refuses_weight_only(need)
        why = why or packings.refuses(need.spec, need.rows, need.columns)
        if why is None and need.dtype == torch.float64:
            why = "activations must be float16, bfloat16 or float32, not float64"
        return why or _too_old(need.device)

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return the weight in the order of `ar_kernels.triton.words`."""
        packing, buffers = packings.pack(weight.to(need.device))
        return PackedWeight(buffers, packing.meta())

    def unpack(self, packed: PackedWeight, need: Need) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`."""
        return packings.unpack(Packing.from_meta(packed.meta), packed.buffers, need.spec)

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        return Packing.from_meta(meta).names

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
        from ar_kernels.triton.ops import triton_linear  # imports Triton

        return triton_linear(x, list(packed.buffers.values()), list(packed.meta), bias)


def interpreting() -> bool:
    """Tell whether Triton's interpreter stands in for a GPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _too_old(device: str) -> str | None:
    if device != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability()
    if found < _OLDEST:
        return f"needs compute capability 8.0 or newer, the device has {found[0]}.{found[1]}"
    return None


_TRIED = "experimental: right in Triton's interpreter, "
CUDA_TRITON = TritonBackend(
    "cuda_triton",
    "cuda",
    100,
    _TRIED + "compiled ahead of time for sm80, sm90, sm100, sm120 and gfx942, never run on a GPU",
)
XPU_TRITON = TritonBackend("xpu_triton", "xpu", 70, _TRIED + "never run on an XPU")
