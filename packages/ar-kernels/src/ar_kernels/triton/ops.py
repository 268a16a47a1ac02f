"""`torch.ops.ar_kernels.triton_linear`. Importing this module registers it and imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ar_kernels.triton import launch
from ar_kernels.triton.packing import Packing


@torch.library.custom_op("ar_kernels::triton_linear", mutates_args=())
def triton_linear(x: Tensor, buffers: list[Tensor], meta: list[int], bias: Tensor | None) -> Tensor:
    """Return x [..., I] times a packed weight [O, I] transposed, plus bias [O]: [..., O].

    Args:
        x: float16, bfloat16 or float32 activations.
        buffers: those of `packing.pack`, in the order of `Packing.names`.
        meta: `Packing.meta()`.
        bias: one value per output feature, or None.
    """
    packing = Packing.from_meta(meta)
    return launch.linear(x, packing, dict(zip(packing.names, buffers, strict=True)), bias)


@triton_linear.register_fake
def _shape_only(
    x: Tensor,
    buffers: list[Tensor],  # noqa: ARG001 - the op's signature
    meta: list[int],
    bias: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty((*x.shape[:-1], Packing.from_meta(meta).rows))
