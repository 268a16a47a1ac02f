"""Modules that take the place of a model's float ones, for decoding on the CPU.

They hold the same parameters under the same names, so state dicts do not change. Where a gradient
is wanted, or a graph is being made (its compiler merges such work with its neighbours), they do
what the module they replace does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ar_kernels.native import steps

if TYPE_CHECKING:
    from typing import Self


def norm_formula(x: Tensor, weight: Tensor, epsilon: float, form: int) -> Tensor:
    """Return what `steps.norm` computes, in torch's own operations: same shape and dtype as x."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if form == steps.ROUNDS_FIRST:
        return weight * wide.to(x.dtype)
    factor = 1.0 + weight.float() if form == steps.ADDS_ONE else weight
    return (factor * wide).to(x.dtype)


class NativeNorm(nn.Module):
    """An RMS norm over the last dimension, of one of the forms of `steps`."""

    def __init__(self, weight: nn.Parameter, epsilon: float, form: int) -> None:
        """Make the norm of a weight [I], which is kept as it is."""
        super().__init__()
        self.weight = weight
        self.eps = self.variance_epsilon = epsilon
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., I], normed."""
        weight = self.weight
        if weight.dtype == x.dtype and is_plain(x, weight):
            out: Tensor = torch.ops.ar_kernels.step_norm(x, weight, self.eps, self.form)
            return out
        return norm_formula(x, weight, self.eps, self.form)

    def extra_repr(self) -> str:
        """Return width and epsilon for `print(model)`."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class NativeLinear(nn.Linear):
    """A float layer that multiplies a few rows at the speed of memory."""

    @classmethod
    def of(cls, given: nn.Linear) -> Self:
        """Return the layer with the parameters of another, shared with it."""
        made = cls(
            given.in_features, given.out_features, bias=False, device="meta", dtype=torch.float32
        )
        made.weight, made.bias = given.weight, given.bias
        return made.train(given.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O]."""
        weight = self.weight
        if (
            x.numel() <= steps.FLOAT_ROWS * self.in_features
            and weight.dtype == x.dtype
            and weight.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
            and is_plain(x, weight)
        ):
            out: Tensor = torch.ops.ar_kernels.step_linear(x, weight, self.bias)
            return out
        return super().forward(x)


def is_plain(x: Tensor, weight: Tensor) -> bool:
    """Tell whether a product is computed here and now, on the CPU, without a gradient."""
    if torch.compiler.is_compiling() or not (x.is_cpu and weight.is_cpu):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
