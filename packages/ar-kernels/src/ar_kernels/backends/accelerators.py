"""The first-party backends of GPUs and other accelerators, and of other projects' kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_kernels.backends.cuda_scaled_mm import CUDA_SCALED_MM
from ar_kernels.backends.cuda_triton import CUDA_TRITON, XPU_TRITON

if TYPE_CHECKING:
    from ar_kernels.backends.base import Backend

ACCELERATORS: tuple[Backend, ...] = (CUDA_TRITON, CUDA_SCALED_MM, XPU_TRITON)
"""All of them; `missing()` says which this machine can run."""
