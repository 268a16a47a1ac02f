"""RMS norms with gradients: forward as in decoding (`steps.norm`), backward in one pass."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.native import library as lib
from ar_kernels.native import steps, tuning

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 64
"""Rows whose gradients of the weight the library sums."""


class _NormGrad(ctypes.Structure):
    """`ar_norm_grad` of api_tuning.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "grad")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "dtype", "form")),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("to_x", "to_weight")),
    )


def serves(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `norm` takes x [..., I] and a weight [I]."""
    fits = weight.shape == x.shape[-1:] and x.shape[-1] % steps.WIDTH == 0
    return fits and x.dtype == weight.dtype and tuning.serves(x, weight)


def norm(x: Tensor, weight: Tensor, epsilon: float, form: int) -> Tensor:
    """Return what `steps.norm` does, differentiable in x and the weight.

    Args:
        x: float32 or bfloat16 [..., I] on the CPU; I is a multiple of `steps.WIDTH`.
        weight: [I], of the type of x.
        epsilon: added to the mean square.
        form: `steps.ROUNDS_FIRST`, `steps.ADDS_ONE` or `steps.PLAIN`.
    """
    out: Tensor = _Norm.apply(x, weight, epsilon, form)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, form: int) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.epsilon, ctx.form = epsilon, form
        return steps.norm(x, weight, epsilon, form)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        columns = x.shape[-1]
        rows = x.numel() // columns
        to_x = torch.empty_like(x)
        to_weight = torch.empty(-(-rows // _ROWS), columns)
        given = _NormGrad(
            *(x.data_ptr(), weight.data_ptr(), grad.data_ptr()),
            *(rows, columns, lib.DTYPES[x.dtype], ctx.form, ctx.epsilon),
            *(to_x.data_ptr(), to_weight.data_ptr()),
        )
        lib.check(lib.library().ar_norm_back(lib.runtime(lib.best_isa()), ctypes.byref(given)))
        return to_x, to_weight.sum(0).to(weight.dtype), None, None
