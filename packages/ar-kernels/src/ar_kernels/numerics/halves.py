"""Activations of microscaling types, quantized in bfloat16: to the bit what float32 gives.

Scales are powers of two and elements have few digits, so nothing is lost in bfloat16; half as many
bytes move, which is what the time goes into (two thirds of it, 2048 rows of 256 to 768 features).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.numerics.activation import fake_quant_activation
from ar_kernels.numerics.elements import E4M3, FloatElement
from ar_kernels.numerics.grouping import grouped, ungrouped
from ar_kernels.numerics.mx import Microscaling
from ar_kernels.registry import data_type

if TYPE_CHECKING:
    from torch import Tensor

    from ar_schemes import TensorSpec

_EXPONENT_BITS = 0x7F80
_MANTISSA = 7
"""Of bfloat16."""


def fake_quant_alike(
    x: Tensor, spec: TensorSpec, *, static: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """Return activations [..., I] quantized and dequantized, of their own type.

    Arguments, gradients and errors are those of `fake_quant_activation`.
    """
    kind = data_type(spec.data_type)
    if (
        x.dtype is torch.bfloat16
        and static is None
        and x.numel()
        and isinstance(kind, Microscaling)
    ):
        element = kind.element(spec)
        if isinstance(element, FloatElement) and element is not E4M3:
            made: Tensor = _FakeQuant.apply(x, spec, kind, element)
            return made
    return fake_quant_activation(x, spec, static=static, zero=zero).to(x.dtype)


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, spec: TensorSpec, kind: Microscaling, element: FloatElement
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        groups = grouped(rows, spec.granularity)
        step = kind.power(groups.abs().amax(-1).float(), spec).to(x.dtype).unsqueeze(-1)
        values = groups / step
        if ctx.needs_input_grad[0]:
            inside = values.abs() <= element.maximum
            ctx.save_for_backward(ungrouped(inside, tuple(rows.shape), spec.granularity))
        made = _rounded(values.clamp_(-element.maximum, element.maximum), element).mul_(step)
        return ungrouped(made, tuple(rows.shape), spec.granularity).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grad * inside.reshape(grad.shape).to(grad.dtype), None, None, None


def _rounded(x: Tensor, element: FloatElement) -> Tensor:
    """Return the nearest values of an element to clamped bfloat16, as `FloatElement.round` does."""
    power = (x.view(torch.int16) & _EXPONENT_BITS).view(torch.bfloat16)
    power.clamp_min_(2.0 ** (1 - element.bias))
    large = power.mul_(1.5 * 2.0 ** (_MANTISSA - element.mantissa))
    return (x + large).sub_(large).copysign_(x)
