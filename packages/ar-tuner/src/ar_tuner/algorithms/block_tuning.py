"""Codes and scales of a block that another algorithm has found, moved on the block's own error.

What `distill` does for a whole model, for one block: latent weights behind the codes and factors
of the scales take small adaptive steps along the gradient of the squared error of the block's
output. It needs the memory of one block, so it serves where a model is too large for the stage.
Training weights, scales and zeros of one block at a time is EfficientQAT's first phase
(arXiv 2407.11062, section 3.2); starting from solved codes, behind a margin, is ours.

Rows held out decide whether the result is kept: what solves a block well on few rows is soon
fitted to them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_tuner.algorithms.judge import block_error
from ar_tuner.algorithms.loop import generator_for
from ar_tuner.distill.stage import latent_of
from ar_tuner.parts import assembled, replacements
from ar_tuner.stages import ModelTarget

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_tuner.algorithms.base import Algorithm, BlockResult, BlockTask, Target
    from ar_tuner.distill.integers import IntegerLatent
    from ar_tuner.distill.latent import Latent

HELD, SHARE = 16, 1 / 8
"""Rows held out: so many, but no larger share than this."""
ENOUGH = 0.005
"""Relative fall of the held-out error below which the result is not kept."""
CODES, SCALES = 3e-3, 8e-4
"""First step sizes: of latent weights in quantization steps, of factors of the scales."""
_WARM = 5


@dataclass(frozen=True)
class Tuned:
    """An algorithm whose blocks are tuned for some steps afterwards."""

    algorithm: Algorithm
    steps: int

    @property
    def name(self) -> str:
        """The algorithm's name."""
        return self.algorithm.name

    @property
    def needs_inputs(self) -> bool:
        """True: blocks are tuned on their inputs."""
        return True

    def quantize(self, task: BlockTask) -> BlockResult:
        """Return what the algorithm finds, or what tuning makes of it."""
        return tuned(task, self.algorithm.quantize(task), self.steps)


def tuned(task: BlockTask, result: BlockResult, steps: int) -> BlockResult:
    """Return a block's result after some steps, or as it was where held-out rows do not gain."""
    assert task.inputs is not None
    held = min(HELD, int(SHARE * task.inputs.rows))
    latents = {t: made for t in task.targets if (made := _latent(task, t, result)) is not None}
    if held < 1 or not latents:
        task.note(f"{task.name}: not tuned further, there are too few rows or nothing can move")
        return result
    judged = task.inputs.held_out(held, task.settings.batch_size)
    taken = frozenset(row for rows in judged for row in rows)
    generator = generator_for(task.settings, task.name)
    draw = task.inputs.minibatches(task.settings.batch_size, generator, without=taken)
    fixed = _stored(task, result.weights)
    before = _error(task, fixed, judged)
    for step in range(steps):
        loss = _step(task, fixed, latents, draw(), _schedule(step, steps), step)
        if (step + 1) % max(1, steps // 4) == 0:
            task.report(step + 1, steps, loss)
    weights = {**result.weights, **{t.ref.layer: x.quantize() for t, x in latents.items()}}
    after = _error(task, _stored(task, weights), judged)
    if not (math.isfinite(after) and after <= (1 - ENOUGH) * before):
        return result
    return dataclasses.replace(result, weights=weights, loss_after=block_error(task, weights))


def _latent(task: BlockTask, target: Target, result: BlockResult) -> Latent | IntegerLatent | None:
    ref = target.ref
    original, weight = task.weight(target), result.weights[ref.layer]
    made = ModelTarget(ref.layer, ref.parameter, ref.transposed, target.scheme, weight, original)
    return latent_of(dataclasses.replace(made, expert=ref.expert, rows=ref.rows))


def _step(  # noqa: PLR0913, PLR0917
    task: BlockTask,
    fixed: Mapping[str, Tensor],
    latents: Mapping[Target, Latent | IntegerLatent],
    rows: Sequence[int],
    share: float,
    step: int,
) -> float:
    """Move everything once and return the loss of the rows it was moved for."""
    leaves = {t: x.leaf(task.block.get_parameter(t.ref.parameter)) for t, x in latents.items()}
    with torch.enable_grad():
        whole = {t.ref.parameter: leaf for t, leaf in leaves.items() if t.ref.whole}
        parts = ((t.ref, leaf) for t, leaf in leaves.items() if not t.ref.whole)
        weights = {**fixed, **whole, **assembled(parts, fixed.__getitem__)}
        loss = _loss(task, weights, rows)
        (loss * 1000.0).backward()  # steps know no scale; the factor keeps gradients from vanishing
    for target, latent in latents.items():
        latent.move(leaves[target], step, codes=CODES * share, scales=SCALES * share)
    return float(loss.detach())


def _loss(task: BlockTask, weights: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
    """Return the mean squared error of the block's output, tokens weighted where they are."""
    output, reference = task.run(weights, rows)
    square = (output.float() - reference.float()).square()
    if task.token_weights is None:
        return square.mean()
    weight = torch.stack([task.token_weights[r] for r in rows]).to(square.device)
    return (square.mean(-1) * weight).mean()


def _error(
    task: BlockTask, weights: Mapping[str, Tensor], chunks: Sequence[Sequence[int]]
) -> float:
    with torch.no_grad():
        total = sum(float(_loss(task, weights, rows)) * len(rows) for rows in chunks)
    return total / sum(len(rows) for rows in chunks)


def _stored(task: BlockTask, weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    return replacements(task.block, [t.ref for t in task.targets], weights)


def _schedule(step: int, steps: int) -> float:
    """Return the share of the first step sizes: a short rise, then half a cosine."""
    return min(1.0, (step + 1) / _WARM) * 0.5 * (1 + math.cos(math.pi * step / steps))
