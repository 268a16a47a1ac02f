"""Second moments of what a layer is given: the curvature of its squared output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call

from ar_tuner.activations import quantized_activations

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from ar_tuner.algorithms.base import BlockTask, Target
    from ar_tuner.rows import RowBank


@dataclass(frozen=True)
class Statistics:
    """Means over the tokens that reach a layer.

    Attributes:
        gram: mean of x x^T, float32 [I, I], x what the layer is given.
        cross: mean of (x0 - x) x^T, x0 what it is given in the float model; None if not asked
            for, or where the two see different tokens.
        tokens: how many tokens were seen.
    """

    gram: Tensor
    cross: Tensor | None
    tokens: int


class _Reached(BaseException):
    """Ends a forward at the layer that was waited for (models cannot catch it)."""


def collect(
    task: BlockTask, target: Target, weights: Mapping[str, Tensor], *, cross: bool
) -> Statistics | None:
    """Return the statistics of a layer over all rows; None if no token reaches it.

    Args:
        task: the block.
        target: the layer.
        weights: replacements of parameters of the block, by name: layers quantized already.
        cross: collect `Statistics.cross` too, where the task has float inputs.
    """
    assert task.inputs is not None
    gram = between = None
    tokens = 0
    for rows in task.inputs.chunks(task.inputs.rows, task.settings.batch_size):
        x = input_of(task, target, task.inputs, rows, weights=weights)
        if x is None or not len(x):
            continue
        gram = x.t() @ x if gram is None else gram.addmm_(x.t(), x)
        tokens += len(x)
        if not cross or task.float_inputs is None:
            continue
        x0 = input_of(task, target, task.float_inputs, rows, weights=None)
        if x0 is None or x0.shape != x.shape:  # routed differently
            cross = False
            continue
        gap = (x0 - x).t()
        between = gap @ x if between is None else between.addmm_(gap, x)
    if gram is None:
        return None
    mean = between.div_(tokens) if between is not None and cross else None
    return Statistics(gram.div_(tokens), mean, tokens)


def input_of(
    task: BlockTask,
    target: Target,
    bank: RowBank,
    rows: Sequence[int],
    *,
    weights: Mapping[str, Tensor] | None,
) -> Tensor | None:
    """Return what a layer is given for some rows, float32 [T, I]; None if it is not called.

    `weights` replaces parameters, and activations are quantized as the schemes say; None: the
    float block. The forward ends at the layer.
    """
    module = task.block.get_submodule(target.ref.parameter.rpartition(".")[0])
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:  # noqa: ARG001
        seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).float())
        raise _Reached

    targets = () if weights is None else task.targets
    args, kwargs = bank.take(rows)
    handle = module.register_forward_hook(hook)  # after what quantizes the activations
    try:
        with torch.no_grad(), quantized_activations(task.block, targets, task.ranges):
            functional_call(task.block, dict(weights or {}), args, kwargs)
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    return None
