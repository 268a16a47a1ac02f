"""Second moments of what each expert of a layer is given.

An expert sees only the tokens that are sent to it. Where these are fewer than its input has
channels, the missing ones are taken from the mean of the layer: H is the mean over its own tokens
and as many average ones as make up the number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.func import functional_call

from ar_tuner.activations import quantized_activations
from ar_tuner.watching import watching

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from ar_tuner.algorithms.base import BlockTask, Target
    from ar_tuner.parts import WeightRef

ROOM = 2**30
"""Bytes of second moments that are held at a time; more experts take further passes."""

TOGETHER = 2**28
"""Bytes of second moments of the experts that are solved at once; the solver needs some more."""


def expert_moments(
    task: BlockTask, group: Sequence[Target], replaced: Mapping[str, Tensor]
) -> Iterator[tuple[list[Target], Tensor]]:
    """Yield (targets of one expert, mean of x x^T [I, I]) of all experts; nothing if none is seen.

    Args:
        task: the block.
        group: the targets of one parameter.
        replaced: replacements of parameters of the block, by name: what is quantized already.
    """
    members: dict[int, list[Target]] = {}
    for target in group:
        assert target.ref.expert is not None
        members.setdefault(target.ref.expert, []).append(target)
    columns = task.weight(group[0]).shape[1]
    size = max(1, ROOM // (4 * columns * columns))
    everyone = list(members)
    mean: Tensor | None = None
    for start in range(0, len(everyone), size):
        chosen = everyone[start : start + size]
        sums, tokens, total = _sums(task, members, replaced, chosen)
        if mean is None:
            if total is None:
                return
            mean = total
        for expert in chosen:
            yield members[expert], _filled(sums.get(expert), tokens.get(expert, 0), mean)


def batched(
    moments: Iterator[tuple[list[Target], Tensor]],
) -> Iterator[list[tuple[list[Target], Tensor]]]:
    """Yield experts in batches whose second moments take `TOGETHER` bytes at most."""
    batch: list[tuple[list[Target], Tensor]] = []
    for members, gram in moments:
        batch.append((members, gram))
        if (len(batch) + 1) * gram.nbytes > TOGETHER:
            yield batch
            batch = []
    if batch:
        yield batch


def _filled(own: Tensor | None, tokens: int, mean: Tensor) -> Tensor:
    """Return the mean over an expert's tokens, filled up with average ones to the width."""
    if own is None:
        return mean
    lacking = max(0, len(mean) - tokens)
    return (own + lacking * mean) / (tokens + lacking)


def _sums(
    task: BlockTask,
    members: Mapping[int, Sequence[Target]],
    replaced: Mapping[str, Tensor],
    chosen: Sequence[int],
) -> tuple[dict[int, Tensor], dict[int, int], Tensor | None]:
    """Return sums of x x^T and tokens of some experts, and the mean over all experts' tokens."""
    sums: dict[int, Tensor] = {}
    tokens: dict[int, int] = {}
    total: Tensor | None = None
    seen = 0

    def watch(refs: Sequence[WeightRef], x: Tensor) -> None:
        nonlocal total, seen
        flat = x.detach().float().reshape(-1, x.shape[-1])
        expert = refs[0].expert
        if not len(flat) or expert is None:
            return
        gram = flat.t() @ flat
        seen += len(flat)
        total = gram.clone() if total is None else total.add_(gram)
        if expert in chosen:
            tokens[expert] = tokens.get(expert, 0) + len(flat)
            sums[expert] = gram if expert not in sums else sums[expert].add_(gram)

    assert task.inputs is not None
    refs = [t.ref for targets in members.values() for t in targets]
    # the watch is outside: it sees activations as they are quantized
    with (
        torch.no_grad(),
        watching(task.block, refs, watch),
        quantized_activations(task.block, task.targets, task.ranges),
    ):
        for rows in task.inputs.chunks(task.inputs.rows, task.settings.batch_size):
            args, kwargs = task.inputs.take(rows)
            functional_call(task.block, dict(replaced), args, kwargs)
    return sums, tokens, None if total is None else total / seen
