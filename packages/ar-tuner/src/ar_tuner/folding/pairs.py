"""Which layer feeds another through what only scales: found by doubling rows, never by names.

A value projection reaches the output projection as a weighted mean of tokens, an up projection
reaches the down projection times a gate: each channel that arrives is proportional to one row of
the layer before. Rows of that layer may then be divided by what columns of the next are scaled by.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ar_tuner.activations import expert_kind
from ar_tuner.algorithms.second_order.tracing import trace
from ar_tuner.folding.finding import few, watched

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

    from ar_tuner.algorithms.base import BlockTask, Target

EXACT = 1e-4
"""Largest square, over that of a channel, by which it may miss what it should be. Doubling is
without rounding in every float type, so what only scales misses by nothing; SiLU misses by .1."""


@dataclass(frozen=True)
class Pair:
    """Two layers, the second of which is given rows of the first, each times something.

    Attributes:
        source: the first.
        taker: the second.
        rows: by input channel of the taker, the row of the source it follows, int64 [I]. Rows
            come several times where query heads share a value head.
    """

    source: Target
    taker: Target
    rows: Tensor


def pairs_of(task: BlockTask, *, known: Collection[str] = ()) -> list[Pair]:
    """Return the pairs of a block, in the order of their second layers.

    A layer that could be the second of a pair by its size, but is not, is told in a note. Layers
    that are called several times or not at all are left alone, so are single experts.

    Args:
        task: the block; schemes of activations should be left out of it.
        known: names of layers whose inputs are accounted for (a norm makes them).
    """
    order = _once(task)
    out: list[Pair] = []
    for place, (taker, normed) in enumerate(order):
        if normed or taker.ref.layer in known:
            continue
        used = {pair.source.ref.layer for pair in out}
        before = [t for t, _ in reversed(order[:place]) if t.ref.layer not in used]
        fitting = [s for s in before if _layouts(*_sizes(task, s, taker))]
        found = (_pair(task, source, taker) for source in fitting)
        pair = next((p for p in found if p is not None), None)
        if pair is not None:
            out.append(pair)
        elif fitting:
            task.note(
                f"{taker.ref.layer} is not folded into a layer before it: what it is given does "
                "not scale with the rows of one"
            )
    return out


def _sizes(task: BlockTask, source: Target, taker: Target) -> tuple[int, int]:
    """Return the rows of one layer and the inputs of another."""
    return task.weight(source).shape[0], task.weight(taker).shape[1]


def _once(task: BlockTask) -> list[tuple[Target, bool]]:
    """Return the layers called exactly once, in order, and whether a norm feeds each."""
    whole = [t for t in task.targets if t.ref.whole and expert_kind(t.ref.layer) is None]
    targets = {id(task.block.get_submodule(t.ref.module)): t for t in whole}
    seen = watched(task)
    count = Counter(id(module) for module, _ in seen.given)
    return [
        (targets[id(module)], seen.normed(given))
        for module, given in seen.given
        if id(module) in targets and count[id(module)] == 1
    ]


def _layouts(rows: int, inputs: int) -> list[Tensor]:
    """Return which rows of a layer may be those that another's inputs follow, likely ones first.

    All of them. Or the last of each of some equal parts: values behind queries and keys (one part,
    one for each group of heads, one for each head), or behind keys alone, or what a gate is
    multiplied with behind the gate (one part, or row by row); that before the gate, too.
    """
    every = torch.arange(rows)
    if rows <= inputs:
        return [] if inputs % rows else [every]
    out: dict[tuple[int, int], Tensor] = {}
    for parts in (n for n in range(1, inputs + 1) if rows % n == 0 and inputs % n == 0):
        size, given = rows // parts, inputs // parts
        values, odd = divmod(size - given, 2)
        for width in (given, *([] if odd or not values or given % values else [values])):
            out[parts, width] = every.view(parts, size)[:, size - width :].flatten()
    first = [every[:inputs], every[::2]] if rows == 2 * inputs else []
    return [*out.values(), *first]


def _pair(task: BlockTask, source: Target, taker: Target) -> Pair | None:
    """Return the pair of two layers, or None where the second's inputs are no scaled rows."""
    plain = _given(task, source, taker, torch.empty(0, dtype=torch.long))
    for layout in _layouts(*_sizes(task, source, taker)):
        missed = (_given(task, source, taker, layout) - 2 * plain).square().sum()
        if missed <= EXACT * plain.square().sum():
            index = _index(task, source, taker, layout, plain)
            if index is not None:
                return Pair(source, taker, layout[index])
    return None


def _index(
    task: BlockTask, source: Target, taker: Target, layout: Tensor, plain: Tensor
) -> Tensor | None:
    """Return which row of a layout each input channel [I] follows; None: of some there is none.

    Rows are numbered. For each binary digit those that have it are doubled; channels that double
    have it too.
    """
    energy, count = plain.square().sum(0), len(layout)
    alive = (energy > 0).cpu()
    index = torch.zeros(len(energy), dtype=torch.long)
    for digit in range((count - 1).bit_length()):
        having = layout[(torch.arange(count) >> digit) & 1 == 1]
        seen = _given(task, source, taker, having)
        same, twice = (((seen - f * plain).square().sum(0) <= EXACT * energy).cpu() for f in (1, 2))
        if not (same | twice)[alive].all():
            return None
        index += (twice & alive).long() << digit
    if not alive.all():  # such as those that a ReLU lets never pass
        straight = torch.arange(len(index))
        if count != len(index) or not alive.any() or not (index == straight)[alive].all():
            return None
        return straight
    return index if int(index.max()) < count else None


def _given(task: BlockTask, source: Target, taker: Target, doubled: Tensor) -> Tensor:
    """Return what a layer is given, float32 [T, I], when rows of another give twice as much."""

    def hook(module: nn.Module, args: object, output: object) -> object:  # noqa: ARG001
        if not isinstance(output, Tensor):  # of a router, say
            return output
        factor = torch.ones(output.shape[-1], dtype=output.dtype, device=output.device)
        factor[doubled.to(output.device)] = 2
        return output * factor

    handle = task.block.get_submodule(source.ref.module).register_forward_hook(hook)
    try:
        seen = trace(task, taker, few(task), weights={})
    finally:
        handle.remove()
    assert seen is not None
    return seen.given
