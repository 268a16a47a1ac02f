"""Ops of the CPU kernels: `torch.ops.ar_kernels.native_linear` and `native_experts`.

`QuantLinear` runs every backend through `ar_kernels::quant_linear`. These two are for modules that
hold packed weights themselves: layers with the same input joined into one (q, k and v; gate and
up), and the experts of a mixture. Importing this module registers them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ar_kernels.native import product
from ar_kernels.native.packing import COLUMNS, COUNT, ROWS

_LIBRARY = torch.library.Library("ar_kernels", "FRAGMENT")
_LIBRARY.define("native_linear(Tensor x, Tensor blob, int[] meta, Tensor? bias) -> Tensor")
_LIBRARY.define(
    "native_experts(Tensor x, Tensor blob, int[] meta, Tensor offsets, Tensor? bias) -> Tensor"
)
_LIBRARY.define("native_expand(Tensor blob, int[] meta, ScalarType dtype) -> Tensor")
_LIBRARY.define(
    "native_experts_backward(Tensor grad, Tensor blob, int[] meta, Tensor offsets) -> Tensor"
)


def native_linear(x: Tensor, blob: Tensor, meta: list[int], bias: Tensor | None = None) -> Tensor:
    """Return x [..., I] times a packed weight [O, I] transposed, plus bias [O]: [..., O].

    Differentiable in x and bias. Computed in the type of x, also under autocast.

    Args:
        x: float32, float16 or bfloat16 on the CPU.
        blob: the weight, as `packing.pack` or `packing.join` made it.
        meta: its integers.
        bias: one value per feature, or None.

    Raises:
        KernelError: x or the blob do not fit the meta.
    """
    out: Tensor = torch.ops.ar_kernels.native_linear(x, blob, meta, bias)
    return out


def native_experts(
    x: Tensor, blob: Tensor, meta: list[int], offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return x [T, I], sorted by expert, times the weight [E, O, I] of each: [T, O].

    Differentiable in x and bias.

    Args:
        x: tokens of expert 0, then those of expert 1, ...
        blob: the experts' weights, joined by `packing.join`.
        meta: their integers.
        offsets: int64 [E + 1], from 0 to T: where each expert's tokens begin, and the end.
        bias: [E, O] or None.

    Raises:
        KernelError: offsets do not rise from 0 to T, or x or the blob do not fit the meta.
    """
    out: Tensor = torch.ops.ar_kernels.native_experts(x, blob, meta, offsets, bias)
    return out


def _linear(x: Tensor, blob: Tensor, meta: list[int], bias: Tensor | None) -> Tensor:
    return product.linear(x, blob, tuple(meta), bias)


def _experts(
    x: Tensor, blob: Tensor, meta: list[int], offsets: Tensor, bias: Tensor | None
) -> Tensor:
    return product.experts_linear(x, blob, tuple(meta), offsets, bias)


def _expand(blob: Tensor, meta: list[int], dtype: torch.dtype) -> Tensor:
    return product.expand(blob, tuple(meta), dtype)


def _experts_gradient(grad: Tensor, blob: Tensor, meta: list[int], offsets: Tensor) -> Tensor:
    """Return the gradient of the experts' x, expert by expert."""
    ends = offsets.tolist()
    out = grad.new_empty(len(grad), meta[COLUMNS])
    for e, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if begin < end:
            alone = product.expert(blob, tuple(meta), e)
            out[begin:end] = grad[begin:end] @ product.expand(*alone, grad.dtype)
    return out


def _linear_shape(x: Tensor, blob: Tensor, meta: list[int], bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], meta[ROWS]))


def _experts_shape(
    x: Tensor,
    blob: Tensor,  # noqa: ARG001 - the op's signature
    meta: list[int],
    offsets: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty((x.shape[0], meta[ROWS]))


def _expand_shape(blob: Tensor, meta: list[int], dtype: torch.dtype) -> Tensor:
    return blob.new_empty((meta[ROWS], meta[COLUMNS]), dtype=dtype)


def _experts_gradient_shape(
    grad: Tensor,
    blob: Tensor,  # noqa: ARG001 - the op's signature
    meta: list[int],
    offsets: Tensor,  # noqa: ARG001
) -> Tensor:
    return grad.new_empty((grad.shape[0], meta[COLUMNS]))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, blob, ctx.meta, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(blob)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients of x and bias; the quantized weight has none."""
    (blob,) = ctx.saved_tensors
    bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
    dense = torch.ops.ar_kernels.native_expand(blob, ctx.meta, grad.dtype)
    return grad @ dense, None, None, bias


def _save_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, blob, ctx.meta, offsets, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(blob, offsets)


def _experts_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients of x and bias."""
    blob, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    to_x = torch.ops.ar_kernels.native_experts_backward(grad, blob, ctx.meta, offsets)
    to_bias = None
    if ctx.has_bias:
        token = torch.arange(grad.shape[0], device=grad.device)
        expert = torch.searchsorted(offsets, token, right=True) - 1
        to_bias = grad.new_zeros(ctx.meta[COUNT], grad.shape[-1]).index_add(0, expert, grad)
    return to_x, None, None, None, to_bias


for _name, _kernel, _fake in (
    ("native_linear", _linear, _linear_shape),
    ("native_experts", _experts, _experts_shape),
    ("native_expand", _expand, _expand_shape),
    ("native_experts_backward", _experts_gradient, _experts_gradient_shape),
):
    _LIBRARY.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"ar_kernels::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "ar_kernels::native_linear", _linear_backward, setup_context=_save_linear, lib=_LIBRARY
)
torch.library.register_autograd(
    "ar_kernels::native_experts", _experts_backward, setup_context=_save_experts, lib=_LIBRARY
)
