"""What a quantized weight should be near: its float weight, or somewhat beside it.

Earlier layers have erred when a layer's turn comes: it is given x where the float model gives x0.
The weight that makes up for it best is W + M with M = E H^-1, H the mean of x x^T and E that of
e x^T, e what the output lacks: W (x0 - x) for a layer inside the block (asymmetric calibration,
GPTAQ, arXiv 2504.02692), or all that the block's output lacks for a layer that adds into it, with
what earlier blocks have left behind. M is fitted to few rows, so it is regularized, and taken in
the share that rows held out find best (the partial strength of QEP, arXiv 2504.09629).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_tuner.algorithms.second_order.statistics import Gap, collect
from ar_tuner.algorithms.second_order.tracing import added_share

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_tuner.algorithms.base import BlockTask, Target
    from ar_tuner.algorithms.second_order.knobs import Knobs
    from ar_tuner.algorithms.second_order.statistics import Moments, Statistics


@dataclass(frozen=True)
class Goal:
    """Where a quantized weight [O, I] should be near, and the share of the move that was taken."""

    weight: Tensor
    share: float


def group_goals(
    task: BlockTask, group: Sequence[Target], replaced: Mapping[str, Tensor], knobs: Knobs
) -> tuple[Tensor, list[Goal]] | None:
    """Return (mean of x x^T, goals) of layers that share their input x; None: no token comes.

    Args:
        task: the block.
        group: the layers.
        replaced: replacements of the block's parameters, by name: layers quantized already.
        knobs: strength and ridge of moves.
    """
    gap, added = (Gap.INPUT, 1.0) if knobs.pull else (Gap.NONE, 1.0)
    if knobs.pull and len(group) == 1:  # of several, each would make up for all of it
        share = added_share(task, group[0])
        gap, added = (Gap.OUTPUT, share) if share else (gap, added)
    seen = collect(task, group[0], replaced, gap=gap)
    if seen is None:
        return None
    weights = [task.weight(t) for t in group]
    return seen.whole.gram, goals(weights, seen, knobs, added=added)


def goals(
    weights: list[Tensor], seen: Statistics, knobs: Knobs, *, added: float = 1.0
) -> list[Goal]:
    """Return the goals of weights [O, I] that share their input, float32.

    Args:
        weights: float weights.
        seen: statistics of their input.
        knobs: strength and ridge of the move.
        added: by what the output of the weight is multiplied on its way into the block's, for
            statistics of gaps of outputs.
    """
    floats = [w.float().contiguous() for w in weights]
    if seen.gap is Gap.NONE or not knobs.pull:
        return [Goal(w, 0.0) for w in floats]
    whole = _slope(seen.whole, knobs.ridge)
    trial = None if seen.others is None else _slope(seen.others, knobs.ridge)
    out = []
    for weight in floats:
        left = weight if seen.gap is Gap.INPUT else None
        share = 1.0
        if trial is not None and seen.held is not None:
            share = _share(_moved(left, trial), _moved(left, seen.held.gap), seen.held.gram)
        move = _moved(left, whole).mul(knobs.pull * share / added)
        out.append(Goal(weight + move, share))
    return out


def _slope(moments: Moments, ridge: float) -> Tensor:
    """Return E (H + ridge)^-1."""
    assert moments.gap is not None
    gram = moments.gram.clone()
    mean = gram.diagonal().mean()
    gram.diagonal().add_(ridge * mean + torch.finfo(gram.dtype).tiny)
    return torch.linalg.solve(gram, moments.gap, left=False)


def _moved(weight: Tensor | None, gap: Tensor | None) -> Tensor:
    assert gap is not None
    return gap if weight is None else weight @ gap


def _share(move: Tensor, gap: Tensor, gram: Tensor) -> float:
    """Return the factor 0 .. 1 of a move that lowers the error of held-out rows most.

    The error is constant - 2 a <M, E> + a^2 <M H, M> in the factor a.
    """
    bend = float(((move @ gram) * move).sum(dtype=torch.float64))
    slope = float((move * gap).sum(dtype=torch.float64))
    return min(max(slope / bend, 0.0), 1.0) if bend > 0 else 0.0
