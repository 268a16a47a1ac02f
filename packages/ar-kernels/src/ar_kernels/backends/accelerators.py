"""The first-party backends of GPUs and other accelerators, and of other projects' kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_kernels.backends.ark import ARK, ARK_XPU
from ar_kernels.backends.cuda_scaled_mm import CUDA_SCALED_MM
from ar_kernels.backends.cuda_tinygemm import TinyGemm
from ar_kernels.backends.cuda_triton import CUDA_TRITON, XPU_TRITON
from ar_kernels.backends.gptqmodel import ExLlama, Marlin
from ar_kernels.backends.hpu import Hpu
from ar_kernels.backends.xpu_ipex import XpuIpex
from ar_kernels.backends.xpu_onednn import XpuOneDnn

if TYPE_CHECKING:
    from ar_kernels.backends.base import Backend

ACCELERATORS: tuple[Backend, ...] = (
    CUDA_SCALED_MM,
    CUDA_TRITON,
    TinyGemm(),
    XpuOneDnn(),
    XPU_TRITON,
    XpuIpex(),
    Hpu(),
    Marlin(),
    ExLlama(),
    ARK,
    ARK_XPU,
)
"""All of them; `missing()` says which this machine can run."""
