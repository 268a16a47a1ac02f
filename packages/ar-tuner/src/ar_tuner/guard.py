"""A second try for blocks that lose far more than their neighbours, or than plain rounding."""

from __future__ import annotations

import dataclasses
import math
from statistics import median
from typing import TYPE_CHECKING

from ar_tuner.algorithms.judge import JUDGED_ROWS, better
from ar_tuner.algorithms.opt_rtn import OptRtn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ar_tuner.algorithms.base import Algorithm, BlockResult, BlockTask, TuneSettings
    from ar_tuner.events import Level

FACTOR = 3.0
"""A block is doubtful from this multiple of its neighbours' median error on."""
NEIGHBOURS = 4
"""Finished blocks before it that a block is compared with."""
FEWEST = 2
"""Neighbours needed for a comparison."""
CALMER = 0.25
"""Share of the first steps that a second try begins with."""


def power(reference: Sequence[Tensor]) -> float:
    """Return the mean square of a block's reference output on the rows it is judged on."""
    rows = reference[:JUDGED_ROWS]
    return sum(float(row.float().square().mean()) for row in rows) / len(rows)


def relative_error(result: BlockResult, scale: float) -> float | None:
    """Return a result's error over the mean square of the reference, or None if unknown."""
    if result.loss_after is None:
        return None
    return result.loss_after / scale if scale > 0 else result.loss_after


def doubt(error: float, before: Sequence[float]) -> str | None:
    """Return why an error is doubtful, or None.

    Args:
        error: relative error of a block.
        before: those of the blocks before it, nearest last.
    """
    if not math.isfinite(error):
        return "its error is not finite"
    near = [e for e in before if math.isfinite(e)][-NEIGHBOURS:]
    if len(near) < FEWEST:
        return None
    usual = median(near)
    if error <= FACTOR * usual:
        return None
    return (
        f"its relative error {error:.3g} is more than {FACTOR:g} times its neighbours' {usual:.3g}"
    )


def guarded(
    algorithm: Algorithm,
    task: BlockTask,
    before: Sequence[float],
    note: Callable[[Level, str], None],
) -> BlockResult:
    """Return what an algorithm makes of a block, the best of several tries if that is doubtful.

    `note` is called with a level and a text about every doubtful block.
    """
    plain = algorithm.quantize(task)
    if plain.loss_after is None or not task.reference:
        return plain
    scale = power(task.reference)
    first = _measured(plain, scale)
    assert first.relative is not None
    why = doubt(first.relative, before)
    why = "tuning left the finite numbers" if why is None and first.diverged else why
    if (
        why is None
        and first.loss_before is not None
        and better(first.loss_before, plain.loss_after)
    ):
        why = f"it loses more than rounding to nearest ({plain.loss_after:.3g} against "
        why += f"{first.loss_before:.3g})"
    if why is None:
        return first
    best, how = first, ""
    for name, attempt in _attempts(algorithm, task):
        other = _measured(attempt(), scale)
        assert best.relative is not None
        if other.relative is not None and better(other.relative, best.relative):
            best, how = other, name
    if how:
        note("warning", f"{task.name}: {why}; {how} gives {best.relative:.3g}, which is kept")
    else:
        note(
            "warning",
            f"{task.name}: {why}, and no other try gave less; more bits for its layers "
            "(layer_config) would help",
        )
    return best


def _measured(result: BlockResult, scale: float) -> BlockResult:
    return dataclasses.replace(result, relative=relative_error(result, scale))


def _attempts(algorithm: Algorithm, task: BlockTask) -> list[tuple[str, Callable[[], BlockResult]]]:
    """Return other ways to quantize a block, by what they are called in a note."""
    if task.settings.iters == 0:
        return []
    calmer = dataclasses.replace(task, settings=_calmer(task.settings))
    return [
        ("tuning with smaller steps", lambda: algorithm.quantize(calmer)),
        ("rounding to nearest with searched scales", lambda: OptRtn().quantize(task)),
    ]


def _calmer(settings: TuneSettings) -> TuneSettings:
    step = CALMER * (settings.lr if settings.lr is not None else 1.0 / settings.iters)
    factor = step if settings.minmax_lr is None else CALMER * settings.minmax_lr
    return dataclasses.replace(
        settings,
        lr=step,
        minmax_lr=factor,
        optimizer="sign",
        momentum=0.0,
        lr_scheduler="linear",
        scale_init="search",
    )
