"""What a weight must be before it is quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from torch import Tensor

    from ar_kernels.numerics.base import Params
    from ar_schemes import TensorSpec


def require_finite(weight: Tensor, spec: TensorSpec, params: Params) -> None:
    """Refuse NaN and infinity, in the weight and in its scales.

    Raises:
        KernelError: there are any.
    """
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        msg = (
            f"the weight of shape {list(weight.shape)} holds {bad} NaN or infinite values and "
            "cannot be quantized; keep the layer in 16 bits or mend the source checkpoint"
        )
        raise KernelError(msg)
    if not torch.isfinite(params.scale).all():
        msg = (
            f"a weight of magnitude {float(weight.abs().max()):.3g} needs a scale beyond the range "
            f"of {spec.scale_dtype} with {spec}; keep the layer in 16 bits"
        )
        raise KernelError(msg)
