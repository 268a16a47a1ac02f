"""What a quantized weight should be near: its float weight, or somewhat beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ar_tuner.algorithms.second_order.knobs import Knobs
    from ar_tuner.algorithms.second_order.statistics import Statistics


def goals(
    weights: list[Tensor], seen: Statistics, knobs: Knobs, *, lack: Tensor | None = None
) -> list[Tensor]:
    """Return the goals of weights [O, I] that share their input, float32.

    With inputs x of the partly quantized model and x0 of the float one, W x0 is met best on
    average by W + W C H^-1, C the mean of (x0 - x) x^T. The move is taken in part only and
    regularized, since it is fitted to calibration rows (the asymmetric calibration of GPTAQ,
    arXiv 2504.02692, and the partial strength of QEP, arXiv 2504.09629).

    `lack` (`residual.output_cross`), for a weight that stands alone, is met by W + lack H^-1.
    """
    floats = [w.float().contiguous() for w in weights]
    cross = lack if lack is not None else seen.cross
    if cross is None or not knobs.pull:
        return floats
    gram = seen.gram.clone()
    mean = gram.diagonal().mean()
    gram.diagonal().add_(knobs.ridge * mean + torch.finfo(gram.dtype).tiny)
    move = torch.linalg.solve(gram, cross, left=False).mul_(knobs.pull)
    return [w + (w @ move if lack is None else move) for w in floats]
