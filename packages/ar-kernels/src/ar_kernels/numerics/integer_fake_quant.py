"""Quantize and dequantize integers in one differentiable step.

What autograd would build from the single operations keeps seven tensors of the weight's size and
walks over it some twenty times; written out, the same gradients need two tensors, a mask and half
the passes (5.8 ms down to 3.8 ms for the block of docs/benchmarks.md). The drawback: `_codes` of
the data type and this forward must stay the same arithmetic, which a test checks to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


class IntegerFakeQuant(torch.autograd.Function):
    """`scale * (clamp(round(w / scale + offset) + zero) - zero)`, straight-through.

    All in groups: weight and offset [..., R, G, n], scale and zero point [..., R, G, 1].
    """

    @staticmethod
    def forward(
        ctx: Any,
        groups: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        offset: Tensor | None,
        bits: int,
    ) -> Tensor:
        """Return the weight the codes stand for."""
        steps = groups / scale
        rounded = (steps if offset is None else steps + offset).round()
        if zero is None:
            peak = 2 ** (bits - 1)
            codes = rounded.clamp(-peak, peak - 1)
        else:
            codes = (rounded + zero).clamp_(0, 2**bits - 1).sub_(zero)
        inside = codes == rounded
        ctx.save_for_backward(steps, codes, inside, scale)
        ctx.has_zero = zero is not None
        return codes * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weight, scale, zero point and offset."""
        steps, codes, inside, scale = ctx.saved_tensors
        to_weight, to_scale, to_zero, to_offset, _ = ctx.needs_input_grad
        weight_grad = scale_grad = zero_grad = offset_grad = None
        passed = grad * inside
        if to_weight:
            weight_grad = passed
        if to_scale:
            scale_grad = (grad * codes).sub_(passed * steps).sum(-1, keepdim=True)
        if to_zero and ctx.has_zero:
            zero_grad = (passed - grad).mul_(scale).sum(-1, keepdim=True)
        if to_offset:
            offset_grad = passed * scale
        return weight_grad, scale_grad, zero_grad, offset_grad, None
