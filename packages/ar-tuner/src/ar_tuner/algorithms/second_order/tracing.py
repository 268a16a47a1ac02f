"""What a layer of a block is given, and what becomes of what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call

from ar_tuner.activations import quantized_activations
from ar_tuner.walk import hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from ar_tuner.algorithms.base import BlockTask, Target

    Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]

ADDED = 1.0
"""Largest relative square of what else a change of a layer's output does to that of the block."""


@dataclass(frozen=True)
class Trace:
    """What a layer was given, float32 [T, I], and the block's output, float32 [T', H]."""

    given: Tensor
    output: Tensor | None


class _Reached(BaseException):
    """Ends a forward at the layer that was waited for (models cannot catch it)."""


def trace(
    task: BlockTask,
    target: Target,
    rows: Sequence[int],
    *,
    weights: Mapping[str, Tensor] | None,
    to_end: bool = False,
) -> Trace | None:
    """Return what passes a layer for some rows (its first call); None if it is not called.

    `weights` replaces parameters, and activations are quantized as the schemes say; None: the
    float block on the float model's inputs. The forward ends at the layer unless `to_end`.
    """
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        if not seen:  # after the hooks that quantize activations
            seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).float())
        if not to_end:
            raise _Reached

    try:
        output = _run(task, target, rows, hook, weights)
    except _Reached:
        return Trace(seen[0], None)
    return Trace(seen[0], output) if seen else None


def added_share(task: BlockTask, target: Target) -> float:
    """Return how much of a layer's output is added into that of the block; 0: something else.

    Found by trial on a few rows: the layer gives twice what it gave, and nothing. The block's
    output should change by the same multiple of it both times. A projection back to the residual
    stream has 1, or what the model multiplies it with. One that goes on into another layer has
    none, nor has one that is normalized first: twice as much then changes next to nothing.
    """
    assert task.inputs is not None
    rows = task.inputs.chunks(1, task.settings.batch_size)[0]
    given: list[Tensor] = []
    before = _run(task, target, rows, lambda m, a, out: given.append(out.detach().float()), {})  # noqa: ARG005
    after = _run(task, target, rows, lambda m, a, out: 2 * out, {})  # noqa: ARG005
    if len(given) != 1:
        return 0.0
    without = _run(task, target, rows, lambda m, a, out: 0 * out, {})  # noqa: ARG005
    own, change = given[0].reshape(-1, given[0].shape[-1]), after - before
    energy = float(own.square().sum())
    if own.shape != change.shape or energy == 0:
        return 0.0
    share = float((own * change).sum()) / energy
    rest = float((change - share * own).square().sum())
    bend = float((change - (before - without)).square().sum())
    return share if max(rest, bend) <= ADDED * share * share * energy else 0.0


def _run(
    task: BlockTask,
    target: Target,
    rows: Sequence[int],
    hook: Hook,
    weights: Mapping[str, Tensor] | None,
) -> Tensor:
    """Return the output of the block [T, H], float32, with a hook on one layer."""
    bank = task.inputs if weights is not None else task.float_inputs
    assert bank is not None
    args, kwargs = bank.take(rows)
    module = task.block.get_submodule(target.ref.parameter.rpartition(".")[0])
    targets = () if weights is None else task.targets
    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad(), quantized_activations(task.block, targets, task.ranges):
            output = hidden(functional_call(task.block, dict(weights or {}), args, kwargs))
            return output.float().reshape(-1, output.shape[-1])
    finally:
        handle.remove()
