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


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, blob, ctx.meta, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(blob)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients of x and bias; the quantized weight has none."""
    (blob,) = ctx.saved_tensors
    bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
    return grad @ _dense(blob, ctx.meta, grad), None, None, bias


def _save_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, blob, ctx.meta, offsets, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(blob, offsets)


def _experts_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients of x and bias, expert by expert."""
    blob, offsets = ctx.saved_tensors
    ends = offsets.tolist()
    to_x = grad.new_empty(len(grad), ctx.meta[COLUMNS])
    to_bias = grad.new_zeros(ctx.meta[COUNT], grad.shape[-1]) if ctx.has_bias else None
    for e, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if begin == end:
            continue
        part = product.expert(blob, tuple(ctx.meta), e)
        to_x[begin:end] = grad[begin:end] @ _dense(*part, grad)
        if to_bias is not None:
            to_bias[e] = grad[begin:end].sum(0)
    return to_x, None, None, None, to_bias


def _dense(blob: Tensor, meta: Any, like: Tensor) -> Tensor:
    return product.expand(blob, tuple(meta), like.dtype)


for _name, _kernel, _fake in (
    ("native_linear", _linear, _linear_shape),
    ("native_experts", _experts, _experts_shape),
):
    _LIBRARY.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"ar_kernels::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "ar_kernels::native_linear", _linear_backward, setup_context=_save_linear, lib=_LIBRARY
)
torch.library.register_autograd(
    "ar_kernels::native_experts", _experts_backward, setup_context=_save_experts, lib=_LIBRARY
)
