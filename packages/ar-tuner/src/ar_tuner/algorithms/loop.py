"""The tuning loop: draw rows, go down the gradient, remember what was best.

What is tuned is an `Objective`: a block against its reference output, the output head against the
float model's probabilities. Everything random comes from the seed and the name of the task.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

import torch

from ar_tuner.algorithms.optimizers import SCHEDULES, make_optimizer
from ar_tuner.algorithms.selection import make_selection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ar_tuner.algorithms.base import BlockTask, TuneSettings
    from ar_tuner.algorithms.optimizers import Knob
    from ar_tuner.rows import RowBank

REPORTS = 10
"""How often the loop reports its loss."""


class Objective(Protocol):
    """What a loop minimizes."""

    def backward(self, rows: Sequence[int], share: float) -> Tensor:
        """Return the loss on some rows; add `share` times its gradient to the knobs'."""

    def error(self, rows: Sequence[int]) -> float:
        """Return the loss on some rows, without gradients."""


def descend(objective: Objective, knobs: Sequence[Knob], task: BlockTask) -> None:
    """Move the knobs down the objective for the steps of the settings, or until it stalls."""
    settings = task.settings
    assert task.inputs is not None
    held = task.inputs.held_out(settings.validation_rows, settings.batch_size)
    draw = _batches(task.inputs, settings, generator_for(settings, task.name), held)
    optimizer = make_optimizer(settings, knobs)
    selection = make_selection(settings, knobs, lambda: mean_error(objective, held))
    left = SCHEDULES[settings.lr_scheduler]
    for step in range(settings.iters):
        loss = _accumulate(objective, draw())
        if selection.offer(step, loss):
            break
        optimizer.step(left(step / settings.iters))
        if (step + 1) % max(1, settings.iters // REPORTS) == 0:
            task.report(step + 1, settings.iters, float(loss))
    selection.settle()


def mean_error(objective: Objective, chunks: Sequence[Sequence[int]]) -> float:
    """Return the mean error over rows that come in chunks."""
    total = sum(objective.error(rows) * len(rows) for rows in chunks)
    return total / sum(len(rows) for rows in chunks)


def generator_for(settings: TuneSettings, name: str) -> torch.Generator:
    """Return the random stream of a block: a function of the seed and the block's name only."""
    digest = hashlib.sha256(f"{settings.seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _accumulate(objective: Objective, batches: list[list[int]]) -> Tensor:
    rows = sum(len(batch) for batch in batches)
    losses = [objective.backward(batch, len(batch) / rows) for batch in batches]
    if len(losses) == 1:
        return losses[0]
    shares = [len(batch) / rows for batch in batches]
    return torch.stack([loss * share for loss, share in zip(losses, shares, strict=True)]).sum()


def _batches(
    bank: RowBank,
    settings: TuneSettings,
    generator: torch.Generator,
    held: Sequence[Sequence[int]],
) -> Callable[[], list[list[int]]]:
    """Return a function that draws the minibatches of one step."""
    size, times = settings.batch_size, settings.accumulate
    without = frozenset(row for rows in held for row in rows)
    if bank.joinable:
        draw = bank.minibatches(size * times, generator, without=without)

        def split() -> list[list[int]]:
            rows = draw()
            return [rows[i : i + size] for i in range(0, len(rows), size)]

        return split
    one = bank.minibatches(size, generator, without=without)

    def gather() -> list[list[int]]:
        units = [one()]
        while sum(map(len, units)) < size * times:
            units.append(one())
        return units

    return gather
