"""The ops behind every quantized layer, in `torch.ops.ar_kernels`.

`quant_linear` multiplies; `quantize_input` fake-quantizes activations before it, where the scheme
asks for that and the backend does not. They are opaque to graph compilers, so a model with
quantized layers compiles without graph breaks whatever runs inside. Importing this module
registers them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ar_kernels.backends.base import PackedWeight
from ar_kernels.backends.reference import decode_meta
from ar_kernels.eager import is_eager
from ar_kernels.registry import backend as find_backend


@torch.library.custom_op("ar_kernels::quant_linear", mutates_args=())
def quant_linear(
    x: Tensor,
    buffers: list[Tensor],
    meta: list[int],
    bias: Tensor | None,
    backend: str,
    rows: int,
) -> Tensor:
    """Return x [..., I] times a packed weight [O, I] transposed, plus bias [O]: [..., O].

    Args:
        x: float activations.
        buffers: the packed weight's buffers, in the order of the backend's `buffer_names`.
        meta: the packed weight's integers.
        bias: one value per output feature, or None.
        backend: name of the backend that packed the weight.
        rows: O.

    Raises:
        KernelError: no backend has that name.
    """
    return _run(x, buffers, meta, bias, backend)


def _run(
    x: Tensor, buffers: list[Tensor], meta: list[int], bias: Tensor | None, backend: str
) -> Tensor:
    family = find_backend(backend)
    names = family.buffer_names(meta)
    packed = PackedWeight(dict(zip(names, buffers, strict=True)), tuple(meta))
    # under autocast the product may come back narrower than what the op promised
    out = family.linear(x, packed, bias)
    return out if out.dtype == x.dtype else out.to(x.dtype)


_LIBRARY = torch.library.Library("ar_kernels", "FRAGMENT")
_LIBRARY.define(
    "quant_linear_plain(Tensor x, Tensor[] buffers, int[] meta, Tensor? bias, str backend, "
    "int rows) -> Tensor"
)


def multiply(
    x: Tensor,
    buffers: list[Tensor],
    meta: list[int],
    bias: Tensor | None,
    backend: str,
    rows: int,
) -> Tensor:
    """Return what `quant_linear` returns, by an op without gradients where none is asked for.

    That op costs 12 us a call less, as much as the product of a small layer. Where nobody looks at
    ops either, what they run is called by itself: another 6 us.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return quant_linear(x, buffers, meta, bias, backend, rows)
    if is_eager(x):
        return _run(x, buffers, meta, bias, backend)
    out: Tensor = torch.ops.ar_kernels.quant_linear_plain(x, buffers, meta, bias, backend, rows)
    return out


def _plain(
    x: Tensor,
    buffers: list[Tensor],
    meta: list[int],
    bias: Tensor | None,
    backend: str,
    rows: int,  # noqa: ARG001 - the op's signature
) -> Tensor:
    return _run(x, buffers, meta, bias, backend)


@quant_linear.register_fake
def _shape_only(
    x: Tensor,
    buffers: list[Tensor],  # noqa: ARG001 - the op's signature
    meta: list[int],  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    backend: str,  # noqa: ARG001
    rows: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_LIBRARY.impl("quant_linear_plain", _plain, "CompositeExplicitAutograd")
torch.library.register_fake("ar_kernels::quant_linear_plain", _shape_only, lib=_LIBRARY)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, buffers, ctx.meta, bias, ctx.backend, _ = inputs
    ctx.columns, ctx.has_bias = x.shape[-1], bias is not None
    ctx.save_for_backward(*buffers)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients of x and bias; the quantized weight has none.

    The weight is read back through the op itself (the product with the identity), so that every
    backend is differentiable in x without further code.
    """
    eye = torch.eye(ctx.columns, dtype=grad.dtype, device=grad.device)
    buffers = list(ctx.saved_tensors)
    weight_t = quant_linear(eye, buffers, ctx.meta, None, ctx.backend, grad.shape[-1])
    bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
    # torch 2.13 takes an empty list of integers for an empty list of tensors and wants one back
    no_meta: list[None] | None = None if ctx.meta else []
    return grad @ weight_t.t(), [None] * len(buffers), no_meta, bias_grad, None, None


quant_linear.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("ar_kernels::quantize_input", mutates_args=())
def quantize_input(
    x: Tensor, spec: list[int], static: Tensor | None, zero: Tensor | None
) -> Tensor:
    """Return activations [..., I] quantized and dequantized, shape and dtype of x.

    The gradient passes straight through, also where a value was clamped.

    Args:
        x: float activations.
        spec: the `TensorSpec` of the activations, as `encode_meta(spec, ())` gives it.
        static: float32 [1]: the step or tensor scale of static activations, None: dynamic.
        zero: float32 [1]: the zero point that goes with `static`, None where there is none.
    """
    return _quantized(x, spec, static, zero)


def _quantized(x: Tensor, spec: list[int], static: Tensor | None, zero: Tensor | None) -> Tensor:
    from ar_kernels.numerics.halves import fake_quant_alike

    fake = fake_quant_alike(x, decode_meta(tuple(spec))[0], static=static, zero=zero)
    return fake.clone() if fake.data_ptr() == x.data_ptr() else fake


def quantized_input(
    x: Tensor, spec: list[int], static: Tensor | None, zero: Tensor | None
) -> Tensor:
    """Return what `quantize_input` returns, without an op where nobody looks at ops.

    Of one row an op costs as much as what it does.
    """
    if is_eager(x) and not (torch.is_grad_enabled() and x.requires_grad):
        return _quantized(x, spec, static, zero)
    out: Tensor = quantize_input(x, spec, static, zero)
    return out


@quantize_input.register_fake
def _same_shape(
    x: Tensor,
    spec: list[int],  # noqa: ARG001 - the op's signature
    static: Tensor | None,  # noqa: ARG001
    zero: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ARG001
    return grad, None, None, None


quantize_input.register_autograd(_straight_through)
