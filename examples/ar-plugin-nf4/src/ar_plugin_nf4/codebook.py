"""The sixteen values of 4-bit NormalFloat, and positions between them.

A position is where a value lies in the codebook, measured in codes: 0 is the first value, 1 the
second, 0.5 half way between. Rounding a position to the nearest whole number finds the nearest
value, so a rounding offset of 0.5 means as much here as it does for integers.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

TOP = 15
"""The last code."""
_HALF = 8
_TAIL = 0.9677083
"""Quantile of the normal distribution that becomes 1 (QLoRA, arXiv 2305.14314, appendix E)."""


@functools.cache
def codebook(device: torch.device) -> Tensor:
    """Return the values float32 [16] from -1 to 1, the eighth of them 0.

    Quantiles of the normal distribution: eight from its lower half, nine from its upper half with
    the 0 in common, scaled to reach 1.
    """
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    lower = normal.icdf(torch.linspace(1 - _TAIL, 0.5, _HALF, dtype=torch.float64))
    upper = normal.icdf(torch.linspace(0.5, _TAIL, _HALF + 1, dtype=torch.float64))
    values = torch.cat([lower[:-1], torch.zeros(1), upper[1:]]) / upper[-1]
    return values.to(device, torch.float32)


def gaps(device: torch.device) -> Tensor:
    """Return the distance from each value to the next, float32 [15]."""
    return codebook(device).diff()


def position(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (position of each value, gap it lies in); beyond the ends the last gap goes on."""
    values = codebook(x.device)
    below = torch.bucketize(x, values[1:-1].contiguous(), right=True)
    gap = gaps(x.device)[below]
    return below + (x - values[below]) / gap, gap
