"""Activations quantized in their own type: to the bit what float32 gives, rounded to that type.

The compiled kernels do it in one pass. Without them microscaling types are computed in bfloat16:
scales are powers of two and elements have few digits, so nothing is lost in bfloat16; half as many
bytes move, which is what the time goes into (two thirds of it, 2048 rows of 256 to 768 features).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.eager import is_eager
from ar_kernels.native import tuning
from ar_kernels.numerics.activation import fake_quant_activation
from ar_kernels.numerics.elements import E4M3, FloatElement
from ar_kernels.numerics.grouping import grouped, ungrouped
from ar_kernels.numerics.mx import Microscaling
from ar_kernels.numerics.nvfp4 import NvFp4, global_scale
from ar_kernels.registry import data_type

if TYPE_CHECKING:
    from torch import Tensor

    from ar_kernels.numerics.base import DataType
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
    rule = _rule(kind, spec, x, static)
    if rule is not None:
        if not is_eager(x) or (torch.is_grad_enabled() and x.requires_grad):
            quantized: Tensor = _Native.apply(x, rule)
            return quantized
        return tuning.fake_quant(x, *rule.arguments(), False)[0]
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


@dataclass(frozen=True)
class _Rule:
    """How the compiled kernels quantize activations; see `tuning.fake_quant`."""

    size: int
    rule: int
    element: FloatElement
    whole: float = 1.0

    def arguments(self) -> tuple[int, int, int, float, list[float]]:
        """Return what `tuning.fake_quant` takes behind x."""
        element = self.element
        constants = list(tuning.constants(element))
        return self.size, self.rule, element.top_exponent, self.whole, constants


def _rule(kind: DataType, spec: TensorSpec, x: Tensor, static: Tensor | None) -> _Rule | None:
    """Return how the compiled kernels quantize such activations, or None where they cannot."""
    if not isinstance(kind, (Microscaling, NvFp4)) or not x.numel() or not tuning.serves(x):
        return None
    element = kind.element(spec)
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    shape = spec.granularity.scale_shape(rows, columns)
    if not isinstance(element, FloatElement) or shape[0] != rows:
        return None
    size = columns // shape[1]
    if isinstance(kind, Microscaling):
        if static is not None:
            return None
        up = kind.name == "mx_fp_rceil"
        return _Rule(size, tuning.ABOVE if up else tuning.BELOW, element)
    if static is None:
        low, high = x.detach().aminmax()
        static = global_scale(torch.maximum(-low, high))
    return _Rule(size, tuning.OF_TENSOR, element, float(static))


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: _Rule) -> Tensor:
        made, inside = torch.ops.ar_kernels.tune_fake_quant(
            x, *rule.arguments(), ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(inside)
        out: Tensor = made
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return torch.ops.ar_kernels.tune_mask(grad, inside), None


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
