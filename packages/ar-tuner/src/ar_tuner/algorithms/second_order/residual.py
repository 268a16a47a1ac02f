"""Layers that write straight into the block's output, and what would make that output right.

A block adds what such a layer gives to its residual stream. Its best weight therefore makes up for
everything that is wrong with the output, wherever the error came from: the goal W + E[e x^T] H^-1,
e = reference - output with the layer still in floats. (Goals that only make up for the layer's own
inputs: KL .0085 against .0080 at 4 bits, .160 against .142 at 2 bits, model of docs/log.md.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_tuner.activations import quantized_activations
from ar_tuner.walk import hidden

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from ar_tuner.algorithms.base import BlockTask, Target

_NUDGE = 0.1
"""Size of the disturbance that is sent through a block, relative to the layer's output."""
_ALIKE, _GAIN = 0.5, 0.25
"""A layer writes into the output if a disturbance comes out alike, and about as large."""


def writes_output(task: BlockTask, target: Target, weights: Mapping[str, Tensor]) -> bool:
    """Tell whether what a layer gives is added to the block's output.

    A random disturbance of the layer's output on a first batch of rows has to come out of the
    block with a cosine of at least 0.5 to itself and within a quarter of its size along it.
    """
    assert task.inputs is not None
    rows = task.inputs.chunks(1, task.settings.batch_size)[0]
    plain, given = _run(task, target, rows, weights)
    if given is None or given.numel() != plain.numel():
        return False
    made = torch.Generator().manual_seed(task.settings.seed)
    noise = torch.randn(given.shape, generator=made).to(given)
    noise *= _NUDGE * given.float().square().mean().sqrt().to(given)
    moved, _ = _run(task, target, rows, weights, added=noise)
    answer = (moved - plain).float().reshape(-1)
    sent = noise.float().reshape(-1)
    along = float(answer @ sent)
    alike = along / max(float(answer.norm() * sent.norm()), 1e-30)
    gain = along / max(float(sent @ sent), 1e-30)
    return alike >= _ALIKE and abs(gain - 1) <= _GAIN


def output_cross(task: BlockTask, target: Target, weights: Mapping[str, Tensor]) -> Tensor | None:
    """Return the mean of e x^T, float32 [O, I]; None if the layer sees other tokens.

    e is what the block's output lacks, x what the layer is given, both with `weights` in place.
    """
    assert task.inputs is not None
    total: Tensor | None = None
    tokens = 0
    for rows in task.inputs.chunks(task.inputs.rows, task.settings.batch_size):
        seen: list[Tensor] = []
        output, _ = _run(task, target, rows, weights, seen=seen)
        wanted = torch.stack([task.reference[r] for r in rows]).to(output)
        lack = (wanted.float() - output.float()).reshape(-1, output.shape[-1])
        if len(seen) != 1 or seen[0].shape[0] != lack.shape[0]:
            return None
        product = lack.t() @ seen[0]
        total = product if total is None else total.add_(product)
        tokens += len(lack)
    return None if total is None else total.div_(tokens)


def _run(
    task: BlockTask,
    target: Target,
    rows: Sequence[int],
    weights: Mapping[str, Tensor],
    *,
    added: Tensor | None = None,
    seen: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the outputs of the block and of a layer in it; activations as the schemes say."""
    assert task.inputs is not None
    module = task.block.get_submodule(target.ref.parameter.rpartition(".")[0])
    given: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ARG001
        given.append(output.detach())
        if seen is not None:
            seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).float())
        return output if added is None else output + added

    args, kwargs = task.inputs.take(rows)
    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad(), quantized_activations(task.block, task.targets, task.ranges):
            output = torch.func.functional_call(task.block, dict(weights), args, kwargs)
    finally:
        handle.remove()
    return hidden(output), given[0] if len(given) == 1 else None
