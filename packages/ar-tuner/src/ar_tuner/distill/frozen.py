"""A quantized weight whose codes stay and whose scales move, without a float copy of it.

What is trained is one factor per scale; the weight is made from the codes whenever a block needs
it, and made again when gradients come back. So a model costs the byte of each code and little
else: end-to-end tuning of scales (EfficientQAT, arXiv 2407.11062, section 3.3) in memory that does
not grow with the state of an optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels import data_type
from ar_kernels.numerics.columns import params_of
from ar_kernels.numerics.grouping import grouped
from ar_tuner.distill.moments import Moments

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_kernels.numerics import Params
    from ar_tuner.stages import ModelTarget


@dataclass(frozen=True)
class FrozenLatent:
    """One quantized weight with codes that stay.

    Attributes:
        target: which weight; its `original` is not looked at.
        params: what it was quantized with.
        factor: of the scales, float32, their shape.
        moments: of the factor's gradient.
    """

    target: ModelTarget
    params: Params
    factor: Tensor
    moments: Moments

    @classmethod
    def of(cls, target: ModelTarget) -> FrozenLatent | None:
        """Return a weight as it stands, or None where its scales cannot move.

        Powers of two cannot move a little; scales of two levels are searched as a whole; where a
        group has a minimum that stays, the weight is not in proportion to its scale.
        """
        weight = target.weight
        if weight.spec.scale_dtype == "e8m0" or weight.spec.super_group is not None:
            return None
        params = params_of(weight, kind=data_type(weight.spec.data_type))
        if params is None or "minimum" in params.extra:
            return None
        factor = torch.ones_like(params.scale)
        return cls(target, params, factor, Moments.like(factor))

    def leaf(self, like: Tensor) -> Callable[[], Tensor]:
        """Return what makes the parameter, with a gradient to the factor; `like`: its type."""
        self.factor.grad = None
        self.factor.requires_grad_()
        return lambda: _Made.apply(self.factor, self, like.dtype)

    def stored(self, like: Tensor) -> Tensor:
        """Return the weight as the model's parameter: its orientation and type."""
        return self.target.view(self.quantize().dequantize()).to(like.dtype).contiguous()

    def quantize(self) -> QuantizedWeight:
        """Return codes and scales as they stand."""
        before = self.target.weight
        with torch.no_grad():
            kind = data_type(before.spec.data_type)
            scale = kind.rescale(self.params, before.spec, self.factor.detach()).scale
        return replace(before, scale=scale.to(before.scale.dtype))

    def move(self, leaf: object, step: int, *, codes: float, scales: float) -> None:  # noqa: ARG002
        """Move against the gradient that came back through `leaf`."""
        grad, self.factor.grad = self.factor.grad, None
        self.factor.requires_grad_(False)  # noqa: FBT003
        if grad is not None:
            self.moments.move(self.factor, grad, step, scales)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that moves, by name."""
        return {
            "factor": self.factor.detach(),
            "factor.first": self.moments.first,
            "factor.second": self.moments.second,
        }


class _Made(torch.autograd.Function):
    """The weight of a factor; in backward it is made again, not remembered."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, latent: FrozenLatent, dtype: torch.dtype) -> Tensor:
        """Return the parameter."""
        ctx.latent = latent
        ctx.save_for_backward(factor)
        return latent.stored(torch.empty(0, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the factor: the weight is in proportion to it."""
        (factor,) = ctx.saved_tensors
        latent: FrozenLatent = ctx.latent
        granularity = latent.target.weight.spec.granularity
        made = grouped(latent.quantize().dequantize(), granularity)
        found = made.mul_(grouped(latent.target.view(grad).float(), granularity)).sum(-1)
        return found / factor, None, None
