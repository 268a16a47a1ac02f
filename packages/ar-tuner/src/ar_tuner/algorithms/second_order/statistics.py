"""Second moments of what a layer is given, and of what its output should change by."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from ar_tuner.algorithms.second_order.tracing import trace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_tuner.algorithms.base import BlockTask, Target

HELD = 8
"""One minibatch in so many is held out, to judge moves of the goal by."""


class Gap(Enum):
    """What the errors of earlier layers are measured by, to be made up for.

    NONE: not at all. INPUT: the float model's input of a layer less its own. OUTPUT: the float
    output of the block less its own (for a layer whose output is added into the block's).
    """

    NONE = "none"
    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True)
class Moments:
    """Means over the tokens that reach a layer, each counted by its weight.

    Attributes:
        gram: mean of x x^T, float32 [I, I], x what the layer is given.
        gap: mean of e x^T, float32: e the gap of inputs [I, I] or of outputs [O, I]; None where
            it was not asked for, or the float model sends other tokens here.
        tokens: how many tokens were seen; the sum of their weights.
    """

    gram: Tensor
    gap: Tensor | None
    tokens: float


@dataclass(frozen=True)
class Statistics:
    """Moments over all rows, and over the rows held out and the others; None: too few rows."""

    gap: Gap
    whole: Moments
    held: Moments | None
    others: Moments | None


class _Sums:
    """Running sums that end as `Moments`."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.gap: Tensor | None = None
        self.tokens = 0.0

    def add(self, x: Tensor, gap: Tensor | None, counts: Tensor | None) -> None:
        counted = x if counts is None else x * counts.to(x.device).unsqueeze(-1)
        self.gram = _plus(self.gram, counted, x)
        self.tokens += len(x) if counts is None else float(counts.sum())
        if gap is not None:
            self.gap = _plus(self.gap, gap, counted)

    def moments(self, *, gap: bool) -> Moments | None:
        if self.gram is None or self.tokens <= 0:
            return None
        whole = self.gap if gap else None
        return Moments(
            self.gram / self.tokens, None if whole is None else whole / self.tokens, self.tokens
        )


def collect(
    task: BlockTask, target: Target, weights: Mapping[str, Tensor], *, gap: Gap = Gap.NONE
) -> Statistics | None:
    """Return the statistics of a layer over all rows; None if no token reaches it.

    Args:
        task: the block.
        target: the layer.
        weights: replacements of parameters of the block, by name: layers quantized already.
        gap: what to measure beside the inputs.
    """
    assert task.inputs is not None
    held, others = _Sums(), _Sums()
    if task.float_inputs is None and gap is Gap.INPUT:
        gap = Gap.NONE
    complete = True
    for i, rows in enumerate(task.inputs.chunks(task.inputs.rows, task.settings.batch_size)):
        seen = trace(task, target, rows, weights=weights, to_end=gap is Gap.OUTPUT)
        if seen is None or not len(seen.given):
            continue
        short = None if gap is Gap.NONE else _gap(task, target, rows, gap, seen.given, seen.output)
        complete = complete and short is not None
        counts = _counts(task, rows, len(seen.given))
        (held if i % HELD == HELD - 1 else others).add(seen.given, short, counts)
    wanted = gap is not Gap.NONE and complete
    parts = [held.moments(gap=wanted), others.moments(gap=wanted)]
    found = [p for p in parts if p is not None]
    if not found:
        return None
    gap = gap if wanted else Gap.NONE
    if len(found) == 1:
        return Statistics(gap, found[0], None, None)
    return Statistics(gap, _joined(found), parts[0], parts[1])


def _counts(task: BlockTask, rows: Sequence[int], tokens: int) -> Tensor | None:
    """Return the weight of each token [T] that a layer is given; None where all count alike.

    An expert is given some tokens only, and nobody says which: they count alike.
    """
    if task.token_weights is None:
        return None
    whole = torch.cat([task.token_weights[r].flatten() for r in rows])
    return whole if len(whole) == tokens else None


def _gap(
    task: BlockTask,
    target: Target,
    rows: Sequence[int],
    gap: Gap,
    given: Tensor,
    output: Tensor | None,
) -> Tensor | None:
    """Return what is missing of each token [T, E]; None where tokens do not correspond."""
    if gap is Gap.OUTPUT:
        assert output is not None
        wanted = torch.stack([task.reference[r] for r in rows]).float().reshape(output.shape)
        return wanted - output if len(output) == len(given) else None
    assert task.float_inputs is not None
    seen = trace(task, target, rows, weights=None)
    if seen is None or seen.given.shape != given.shape:
        return None
    return seen.given - given


def _plus(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a.t() @ b if total is None else total.addmm_(a.t(), b)


def _joined(parts: Sequence[Moments]) -> Moments:
    tokens = sum(p.tokens for p in parts)
    gram = sum(p.gram * (p.tokens / tokens) for p in parts)
    gaps = [p.gap * (p.tokens / tokens) for p in parts if p.gap is not None]
    assert isinstance(gram, torch.Tensor)
    return Moments(gram, torch.stack(gaps).sum(0) if gaps else None, tokens)
