"""Coordinate descent: each weight in turn to the best value of its grid, all others held.

With R = (goal - values) H, the best real value of one weight is value + R / H_jj; the nearest one
of the grid cannot make J larger, since J is a parabola in one weight. Rows are independent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_tuner.algorithms.second_order.sweep import PANEL

if TYPE_CHECKING:
    from torch import Tensor

    from ar_kernels.numerics import Params
    from ar_tuner.algorithms.second_order.curvature import Curvature
    from ar_tuner.algorithms.second_order.grid import Grid

ENOUGH = 1e-4
"""Relative fall of J in a cycle below which no further one is made."""


def descend(
    goal: Tensor, values: Tensor, grid: Grid, curvature: Curvature, *, cycles: int
) -> Tensor:
    """Return values of the grid [O, I] with J no larger than that of `values`, storage order.

    Args:
        goal: what J measures the distance to, [O, I].
        values: where to start, on the grid.
        grid: committed parameters.
        curvature: H.
        cycles: passes over all columns at most.
    """
    order, gram = curvature.order, curvature.ordered
    now = values.float().t()[order].contiguous()  # [I, O]
    wanted = goal.float().t()[order].contiguous()
    pull = gram @ (wanted - now)
    before = float(((wanted - now) * pull).sum(dtype=torch.float64))
    panels = [(i, min(i + PANEL, len(order))) for i in range(0, len(order), PANEL)]
    params = [grid.columns(order[first:last]) for first, last in panels]
    for _ in range(cycles):
        for (first, last), own in zip(panels, params, strict=True):
            inner = gram[first:last, first:last]
            moved = _panel(now[first:last], pull[first:last].clone(), own, grid, inner)
            pull.addmm_(gram[:, first:last], moved, alpha=-1)
        after = float(((wanted - now) * pull).sum(dtype=torch.float64))
        if before - after <= ENOUGH * before:
            break
        before = after
    out = torch.empty_like(now)
    out[order] = now
    return out.t().contiguous()


def _panel(now: Tensor, pull: Tensor, params: list[Params], grid: Grid, gram: Tensor) -> Tensor:
    """Move each column of a panel (in place) and return by how much, [n, O]."""
    start = now.clone()
    energy = gram.diagonal().tolist()
    for j, own in enumerate(params):
        old, step = now[j].clone(), pull[j] / energy[j]
        best = grid.nearest(old + step, own)
        # a tie keeps the old value, so that a cycle ends where nothing improves
        now[j] = torch.where((best - old - step).abs() < step.abs(), best, old)
        pull.addr_(gram[:, j], now[j] - old, alpha=-1)
    return now - start
