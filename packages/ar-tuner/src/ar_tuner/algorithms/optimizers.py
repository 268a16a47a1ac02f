"""How the tensors of a tuning loop are moved: signed steps or Adam, and how steps shrink."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ar_tuner.algorithms.base import TuneSettings

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}
"""What is left of the first step when a share `done` of all steps is behind."""
OPTIMIZERS = ("sign", "adam")


@dataclass(frozen=True)
class Knob:
    """One tensor that the loop moves: its first step, and the range [0, upper] it stays in."""

    value: Tensor
    size: float
    upper: float | None = None


class Optimizer(Protocol):
    """Moves knobs by their gradients."""

    def step(self, left: float) -> None:
        """Move every knob that has a gradient by `left` times its first step; forget gradients."""


class SignDescent:
    """Steps by the sign of the gradient, or of its running sum with momentum.

    Source: arXiv 2309.05516, section 3.
    """

    def __init__(self, knobs: Sequence[Knob], *, momentum: float = 0.0) -> None:
        self._knobs = knobs
        self._momentum = momentum
        self._sums: dict[int, Tensor] = {}

    def step(self, left: float) -> None:
        """Move every knob that has a gradient; forget gradients."""
        with torch.no_grad():
            for index, knob in enumerate(self._knobs):
                grad, knob.value.grad = knob.value.grad, None
                if grad is None:
                    continue
                if self._momentum:
                    past = self._sums.get(index)
                    grad = grad if past is None else past.mul_(self._momentum).add_(grad)
                    self._sums[index] = grad
                    knob.value.sub_(grad.sign(), alpha=knob.size * left)
                else:
                    knob.value.sub_(grad.sign_(), alpha=knob.size * left)
                _keep_in_range(knob)


class Adam:
    """Steps of AdamW without weight decay."""

    def __init__(self, knobs: Sequence[Knob], *, momentum: float = 0.9) -> None:
        self._knobs = knobs
        self._inner = torch.optim.AdamW(
            [{"params": [k.value], "lr": k.size} for k in knobs],
            betas=(momentum, 0.999),
            weight_decay=0.0,
        )

    def step(self, left: float) -> None:
        """Move every knob that has a gradient; forget gradients."""
        for knob, group in zip(self._knobs, self._inner.param_groups, strict=True):
            group["lr"] = knob.size * left
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)
        with torch.no_grad():
            for knob in self._knobs:
                _keep_in_range(knob)


def make_optimizer(settings: TuneSettings, knobs: Sequence[Knob]) -> Optimizer:
    """Return the optimizer that the settings name."""
    if settings.optimizer == "adam":
        return Adam(knobs)
    return SignDescent(knobs, momentum=settings.momentum)


def _keep_in_range(knob: Knob) -> None:
    if knob.upper is not None:
        knob.value.clamp_(0.0, knob.upper)
