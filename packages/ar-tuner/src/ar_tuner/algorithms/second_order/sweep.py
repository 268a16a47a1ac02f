"""One pass over the columns, each correcting the rest for its rounding error.

GPTQ (arXiv 2210.17323): columns in the order of falling energy, panels of 128 so that most of the
work is one matrix product. Groups keep the places they have in storage ("static groups": their
parameters are committed beforehand), so no format needs to know the order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ar_tuner.algorithms.second_order.curvature import Curvature
    from ar_tuner.algorithms.second_order.grid import Grid

PANEL = 128
"""Columns whose corrections are applied one by one before the rest gets them at once."""


def sweep(goal: Tensor, grid: Grid, curvature: Curvature) -> Tensor:
    """Return values of the grid [O, I] near a goal [O, I], float32, in storage order."""
    order, upper = curvature.order, curvature.upper
    left = goal.float().t()[order].contiguous()  # [I, O]: columns are contiguous
    for first in range(0, len(order), PANEL):
        last = min(first + PANEL, len(order))
        params = grid.columns(order[first:last])
        panel, inner = left[first:last], upper[first:last, first:last]
        errors = torch.empty_like(panel)
        for j, own in enumerate(params):
            wanted = panel[j].clone()
            panel[j] = grid.nearest(wanted, own)
            torch.div(wanted - panel[j], inner[j, j], out=errors[j])
            panel[j + 1 :].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
        left[last:].addmm_(upper[first:last, last:].t(), errors, alpha=-1)
    out = torch.empty_like(left)
    out[order] = left
    return out.t().contiguous()
