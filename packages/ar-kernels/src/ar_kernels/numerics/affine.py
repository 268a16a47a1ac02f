"""`scale * code + minimum` in one differentiable step; scales may be zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ar_kernels.numerics.base import Params


def divisor(scale: Tensor) -> Tensor:
    """Return the scale to divide by: infinite where it is zero, so that codes become zero."""
    return torch.where(scale == 0, torch.inf, scale)


def affine_nearest(values: Tensor, params: Params, low: int, high: int) -> Tensor:
    """Return `scale * clamp(round((value - minimum) / scale)) + minimum`, one scale per element."""
    minimum = params.extra.get("minimum")
    steps = values if minimum is None else values - minimum
    codes = (steps / divisor(params.scale)).round_().clamp_(low, high).mul_(params.scale)
    return codes if minimum is None else codes.add_(minimum)


class AffineFakeQuant(torch.autograd.Function):
    """`scale * clamp(round((w - minimum) / scale + offset)) + minimum`, straight-through.

    All in groups: weight and offset [..., R, G, n], scale and minimum [..., R, G, 1].
    """

    @staticmethod
    def forward(
        ctx: Any,
        groups: Tensor,
        scale: Tensor,
        minimum: Tensor | None,
        offset: Tensor | None,
        low: int,
        high: int,
    ) -> Tensor:
        """Return the weight the codes stand for."""
        steps = (groups if minimum is None else groups - minimum) / divisor(scale)
        rounded = (steps if offset is None else steps + offset).round()
        codes = rounded.clamp(low, high)
        ctx.save_for_backward(steps, codes, codes == rounded, scale)
        out = codes * scale
        return out if minimum is None else out + minimum

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weight, scale, minimum and offset."""
        steps, codes, inside, scale = ctx.saved_tensors
        to_weight, to_scale, to_minimum, to_offset = ctx.needs_input_grad[:4]
        passed = grad * inside
        scale_grad = minimum_grad = None
        if to_scale:
            scale_grad = (grad * codes).sub_(passed * steps).sum(-1, keepdim=True)
        if to_minimum:
            minimum_grad = (grad - passed).sum(-1, keepdim=True)
        return (
            passed if to_weight else None,
            scale_grad,
            minimum_grad,
            passed * scale if to_offset else None,
            None,
            None,
        )
