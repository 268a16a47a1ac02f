"""What all weights in motion do alike whose gradient comes back through the stored parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from ar_kernels.native import tuning

if TYPE_CHECKING:
    from torch import Tensor

    from ar_tuner.distill.moments import Moments


class StoredLeaf(ABC):
    """A weight whose value and scale factors move; either may stay."""

    value: Tensor
    factor: Tensor | None
    value_moments: Moments | None
    factor_moments: Moments | None

    @abstractmethod
    def stored(self, like: Tensor) -> Tensor:
        """Return the weight as the model's parameter: rounded, its orientation and type."""

    @abstractmethod
    def step(self, grad: Tensor, step: int, *, codes: float, scales: float) -> None:
        """Move against the gradient of the parameter as `stored` returned it."""

    def leaf(self, like: Tensor) -> Tensor:
        """Return the parameter, for a gradient to come back to."""
        return self.stored(like).requires_grad_()

    def move(self, leaf: object, step: int, *, codes: float, scales: float) -> None:
        """Move against the gradient that came back to `leaf`; as `step`."""
        assert isinstance(leaf, torch.Tensor)
        if leaf.grad is not None:
            self.step(leaf.grad, step, codes=codes, scales=scales)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that moves, by name."""
        out = {"value": self.value}
        for name, moments in (("value", self.value_moments), ("factor", self.factor_moments)):
            if moments is not None:
                out |= {f"{name}.first": moments.first, f"{name}.second": moments.second}
        return out if self.factor is None else out | {"factor": self.factor}


def compiled(value: Tensor, scale: Tensor, *others: Tensor) -> bool:
    """Tell whether the compiled kernels move a weight: groups along rows, on the CPU.

    Args:
        value: of the latent, [O, I].
        scale: one value per group.
        others: what else takes part, such as the gradient or the parameter.
    """
    (rows, columns), (count, groups) = value.shape, scale.shape[-2:]
    even = count == rows and columns % groups == 0 and columns // groups % tuning.LANES == 0
    return even and value.is_contiguous() and tuning.serves(value, *others)
