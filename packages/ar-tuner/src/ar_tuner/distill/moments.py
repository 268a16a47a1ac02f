"""Adam with one step size per element (arXiv 1412.6980, algorithm 1), in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels.native import tuning

if TYPE_CHECKING:
    from torch import Tensor

FIRST, SECOND = 0.9, 0.95
"""Decay of the moments. A short second one: 0.99 lost a third of the gain at 75 steps."""
_TINY = 1e-12


@dataclass(frozen=True)
class Moments:
    """The moments of one tensor's gradient, float32, of its shape."""

    first: Tensor
    second: Tensor

    @classmethod
    def like(cls, value: Tensor) -> Moments:
        """Return zeros for a tensor."""
        return cls(torch.zeros_like(value), torch.zeros_like(value))

    def move(self, value: Tensor, grad: Tensor, step: int, size: Tensor | float) -> None:
        """Move `value` against its gradient, by about `size` where the gradient is steady.

        Args:
            value: changed in place.
            grad: float32, of its shape.
            step: number of the step, from 0.
            size: step size, broadcast to the value.
        """
        self.first.lerp_(grad, 1 - FIRST)
        self.second.mul_(SECOND).addcmul_(grad, grad, value=1 - SECOND)
        root = self.second.div(1 - SECOND ** (step + 1)).sqrt_().add_(_TINY)
        move = (self.first / root).mul_(1 / (1 - FIRST ** (step + 1)))
        value.sub_(move.mul_(size))

    def adam(self, step: int, size: float, unit: Tensor | None = None) -> tuning.Adam:
        """Return what `move` does, for the compiled kernels; `unit` is what the size is times."""
        first, second = 1 - FIRST ** (step + 1), 1 - SECOND ** (step + 1)
        keep = FIRST, SECOND
        return tuning.Adam(self.first, self.second, unit, size / first, keep, 1 / second, _TINY)
