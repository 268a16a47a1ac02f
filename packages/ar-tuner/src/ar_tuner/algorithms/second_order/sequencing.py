"""Which layers of a block come before which, and which share their input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_tuner.parts import replacements
from ar_tuner.watching import watching

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_tuner.algorithms.base import BlockTask, Target
    from ar_tuner.parts import WeightRef

    Group = tuple[Target, ...]
    Handle = Callable[[Group, Mapping[str, Tensor]], Mapping[str, QuantizedWeight]]


def in_order(
    task: BlockTask, weights: Mapping[str, QuantizedWeight], handle: Handle
) -> dict[str, QuantizedWeight]:
    """Return the weights that `handle` makes of each group of layers, by layer name.

    Args:
        task: the block.
        weights: what is quantized beforehand; later groups see it until it is replaced.
        handle: called with a group and the replacements of the block's parameters so far.
    """
    made = dict(weights)
    replaced = replacements(task.block, [t.ref for t in task.targets], made)
    for group in layer_groups(task):
        made |= handle(group, replaced)
        replaced |= replacements(task.block, [t.ref for t in group], made, replaced)
    return made


def layer_groups(task: BlockTask) -> list[Group]:
    """Return the targets of a block in the order of their first call, in groups of equal input.

    Layers that are given the very same tensor form a group (q, k, v; gate, up), and so do the
    experts of one parameter. Layers that a first batch of rows does not reach come last, each
    alone.
    """
    groups: list[tuple[Tensor, list[Target]]] = []
    placed: set[Target] = set()
    for target, given in _calls(task):
        if target in placed:
            continue
        members = _mates(task, target)
        placed.update(members)
        if groups and target.ref.whole and _same(groups[-1][0], given):
            groups[-1][1].append(target)
        else:
            groups.append((given, members))
    ordered = [tuple(members) for _, members in groups]
    for target in task.targets:
        if target not in placed:
            ordered.append(tuple(_mates(task, target)))
            placed.update(ordered[-1])
    return ordered


def _mates(task: BlockTask, target: Target) -> list[Target]:
    """Return the targets that one parameter holds: all experts, or the target alone."""
    if target.ref.whole:
        return [target]
    return [t for t in task.targets if t.ref.parameter == target.ref.parameter]


def _calls(task: BlockTask) -> list[tuple[Target, Tensor]]:
    """Return which targets one batch of rows calls, in order, with what."""
    assert task.inputs is not None
    calls: list[tuple[Target, Tensor]] = []

    by_layer = {t.ref.layer: t for t in task.targets}

    def watch(refs: Sequence[WeightRef], x: Tensor) -> None:
        calls.extend((by_layer[ref.layer], x) for ref in refs)

    with watching(task.block, [t.ref for t in task.targets], watch), torch.no_grad():
        task.run({}, task.inputs.chunks(1, task.settings.batch_size)[0])
    return calls


def _same(a: Tensor, b: Tensor) -> bool:
    # every tensor of a forward is kept alive here, so equal addresses mean equal contents
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    )
