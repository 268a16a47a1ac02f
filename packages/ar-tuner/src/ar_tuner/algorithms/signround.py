"""SignRound: rounding offsets and clip factors, tuned by signed gradients against the block output.

Source: "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
(arXiv 2309.05516), section 3; scale initialisation, outlier suppression and frozen K-quant scales
after SignRoundV2 (arXiv 2512.04746). The loop is in `loop`, its parts in `optimizers`, `losses`
and `selection`, what it moves in `tunables`, the output head in `head`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ar_tuner.algorithms.base import BlockResult
from ar_tuner.algorithms.head import tune_head
from ar_tuner.algorithms.judge import JUDGED_ROWS, better, block_error
from ar_tuner.algorithms.loop import descend, generator_for
from ar_tuner.algorithms.losses import loss_of
from ar_tuner.algorithms.rtn import nearest_of
from ar_tuner.algorithms.tunables import Tunables, knobs_of, start
from ar_tuner.parts import assembled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_tuner.algorithms.base import BlockTask

__all__ = ["JUDGED_ROWS", "SignRound", "Tunables", "block_error", "generator_for"]


class SignRound:
    """Algorithm `signround`."""

    name = "signround"
    needs_inputs = True

    def quantize(self, task: BlockTask) -> BlockResult:
        """Return the tuned weights of a block, or the nearest where those lose less."""
        assert task.inputs is not None
        plain = nearest_of(task)
        before = block_error(task, plain)
        if task.settings.iters == 0:
            return BlockResult(plain, before, before)
        tunables = start(task)
        descend(BlockObjective(task, tunables), knobs_of(tunables, task.settings), task)
        if not all(t.is_finite() for t in tunables):
            return BlockResult(plain, before, before, diverged=True)
        tuned = {t.target.ref.layer: t.quantize() for t in tunables}
        after = block_error(task, tuned)
        if better(before, after):  # wide types have nothing to gain and may drift
            return BlockResult(plain, before, before, diverged=not math.isfinite(after))
        return BlockResult(tuned, before, after)

    def quantize_head(self, task: BlockTask) -> BlockResult:
        """Return the tuned weight of the output head; see `head.tune_head`."""
        return tune_head(task)


class BlockObjective:
    """The loss of a block's output against its reference."""

    def __init__(self, task: BlockTask, tunables: Sequence[Tunables]) -> None:
        self._task = task
        self._tunables = tunables
        self._loss = loss_of(task)

    def backward(self, rows: Sequence[int], share: float) -> Tensor:
        """Return the loss on some rows; add `share` times its gradient to the tunables'."""
        with torch.enable_grad():
            loss = self._loss_on(rows)
            # only the sign of the gradient is used; the factor keeps small ones from vanishing
            (loss * (1000.0 * share)).backward()
        return loss.detach()

    def error(self, rows: Sequence[int]) -> float:
        """Return the loss on some rows, without gradients."""
        with torch.no_grad():
            return float(self._loss_on(rows))

    def _loss_on(self, rows: Sequence[int]) -> Tensor:
        pairs = [(t.target.ref, t.fake_quant()) for t in self._tunables]
        weights = assembled(pairs, self._task.block.get_parameter)
        return self._loss(*self._task.run(weights, rows))
