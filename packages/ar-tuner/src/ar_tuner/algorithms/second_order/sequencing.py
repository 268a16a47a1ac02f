"""Which layers of a block come before which, and which share their input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_tuner.algorithms.base import as_parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_tuner.algorithms.base import BlockTask, Target

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
    replaced = _parameters(task, task.targets, made)
    for group in layer_groups(task):
        made |= handle(group, replaced)
        replaced |= _parameters(task, group, made)
    return made


def layer_groups(task: BlockTask) -> list[Group]:
    """Return the targets of a block in the order of their first call, in groups of equal input.

    Layers that are given the very same tensor form a group (q, k, v; gate, up). Layers that a
    first batch of rows does not reach come last, each alone.
    """
    groups: list[tuple[Tensor, list[Target]]] = []
    placed: set[Target] = set()
    for target, given in _calls(task):
        if target in placed:
            continue
        placed.add(target)
        if groups and _same(groups[-1][0], given):
            groups[-1][1].append(target)
        else:
            groups.append((given, [target]))
    ordered = [tuple(members) for _, members in groups]
    return ordered + [(t,) for t in task.targets if t not in placed]


def _calls(task: BlockTask) -> list[tuple[Target, Tensor]]:
    """Return which targets one batch of rows calls, in order, with what."""
    assert task.inputs is not None
    calls: list[tuple[Target, Tensor]] = []

    def watch(target: Target) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            calls.append((target, args[0]))

        return hook

    handles = []
    try:
        for target in task.targets:
            module = task.block.get_submodule(target.ref.parameter.rpartition(".")[0])
            handles.append(module.register_forward_pre_hook(watch(target)))
        with torch.no_grad():
            task.run({}, task.inputs.chunks(1, task.settings.batch_size)[0])
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _same(a: Tensor, b: Tensor) -> bool:
    # every tensor of a forward is kept alive here, so equal addresses mean equal contents
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    )


def _parameters(
    task: BlockTask, targets: Group, weights: Mapping[str, QuantizedWeight]
) -> dict[str, Tensor]:
    """Return the quantized weights there are as the block stores them, by parameter name."""
    return {
        t.ref.parameter: as_parameter(
            t, weights[t.ref.layer].dequantize(), task.block.get_parameter(t.ref.parameter)
        )
        for t in targets
        if t.ref.layer in weights
    }
