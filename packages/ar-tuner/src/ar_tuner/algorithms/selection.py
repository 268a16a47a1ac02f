"""Which iterate of a tuning loop is returned: the last, or the best by some measure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ar_tuner.algorithms.base import TuneSettings
    from ar_tuner.algorithms.optimizers import Knob

LOOKS = 20
"""How often in a loop the validation rows are looked at."""


class Selection(Protocol):
    """Watches the iterates."""

    def offer(self, step: int, loss: Tensor) -> bool:
        """Consider the iterate that gave a minibatch loss; return True to stop the loop."""

    def settle(self) -> None:
        """Leave the chosen iterate in the knobs."""


class Last:
    """The last iterate."""

    def offer(self, step: int, loss: Tensor) -> bool:  # noqa: ARG002
        """Go on."""
        return False

    def settle(self) -> None:
        """Leave the knobs as they are."""


class Best:
    """The iterate of least minibatch loss, as the published method keeps it.

    Losses of different minibatches are compared, so it is in part the iterate that met the
    easiest rows; `Validated` compares on the same rows.
    """

    def __init__(self, knobs: Sequence[Knob], *, patience: int = 0) -> None:
        self._knobs = knobs
        self._patience = patience
        self._least = math.inf
        self._when = 0
        self._saved: list[Tensor] = []

    def offer(self, step: int, loss: Tensor) -> bool:
        """Keep a copy of a better iterate; stop when none came for `patience` steps."""
        self.consider(step, float(loss))
        return 0 < self._patience <= step - self._when

    def consider(self, step: int, error: float) -> None:
        """Keep a copy of the knobs if the error is the least so far."""
        if error < self._least:
            self._least, self._when = error, step
            self._saved = [k.value.detach().clone() for k in self._knobs]

    def settle(self) -> None:
        """Put the best copy back."""
        with torch.no_grad():
            for knob, saved in zip(self._knobs, self._saved, strict=False):
                knob.value.copy_(saved)


class Validated(Best):
    """The iterate of least error on rows that are never tuned on, the last one among them."""

    def __init__(
        self,
        knobs: Sequence[Knob],
        judge: Callable[[], float],
        *,
        steps: int,
        patience: int = 0,
    ) -> None:
        super().__init__(knobs, patience=patience)
        self._judge = judge
        self._steps = steps

    def offer(self, step: int, loss: Tensor) -> bool:  # noqa: ARG002
        """Judge every so many steps; stop when none was better for `patience` steps."""
        if step % max(1, self._steps // LOOKS) == 0:
            self.consider(step, self._judge())
        return 0 < self._patience <= step - self._when

    def settle(self) -> None:
        """Judge the iterate after the last step too, and put the best copy back."""
        self.consider(self._steps, self._judge())
        super().settle()


def make_selection(
    settings: TuneSettings, knobs: Sequence[Knob], judge: Callable[[], float]
) -> Selection:
    """Return the selection that the settings ask for; `judge` gives the error on held-out rows."""
    if settings.keep == "last":
        return Last()
    if settings.validation_rows:
        return Validated(knobs, judge, steps=settings.iters, patience=settings.patience)
    return Best(knobs, patience=settings.patience)
