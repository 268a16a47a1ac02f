"""What a block's quantized weights cost, on rows that are the same before and after."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ar_tuner.parts import replacements

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ar_kernels import QuantizedWeight
    from ar_tuner.algorithms.base import BlockTask

JUDGED_ROWS = 32
"""Rows on which the error before and after tuning is reported."""


def block_error(task: BlockTask, weights: Mapping[str, QuantizedWeight]) -> float:
    """Return the mean squared error of the block's output with quantized weights."""
    replaced = replacements(task.block, [t.ref for t in task.targets], weights)
    assert task.inputs is not None
    total, count = 0.0, 0
    with torch.no_grad():
        for rows in task.inputs.chunks(JUDGED_ROWS, task.settings.batch_size):
            output, reference = task.run(replaced, rows)
            total += float((output.float() - reference.float()).square().mean()) * len(rows)
            count += len(rows)
    return total / count


def better(error: float, than: float) -> bool:
    """Tell whether an error is less than another; one that is no number is never better."""
    return math.isfinite(error) and not error >= than
