"""The least predicted loss within a budget: one choice per unit, costs and losses add up.

The multiple-choice knapsack (Kellerer, Pferschy, Pisinger, "Knapsack Problems", chapter 11). A
sweep over the lower convex hulls of all units gives the optimum of the relaxation and a whole
number solution beside it; dynamic programming over undominated partial solutions then finds the
optimum, dropping what the Lagrangian bound shows to be no better than the solution at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MAX_STATES = 200_000
"""Partial solutions kept; beyond, those of the best bound stay and the gap is reported."""
_SLACK = 1e-12


@dataclass(frozen=True)
class Choices:
    """What one unit can get: `costs` (whole numbers) and `losses`, by option."""

    costs: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Solution:
    """The option of every unit, what it costs and is predicted to lose.

    `bound`: no solution within the budget loses less than this.
    """

    picks: tuple[int, ...]
    cost: int
    loss: float
    bound: float


def solve(units: Sequence[Choices], budget: int) -> Solution:
    """Return the choice of least total loss whose total cost is within the budget.

    Raises:
        TunerError: even the cheapest choice of every unit is over the budget.
    """
    least = sum(min(u.costs) for u in units)
    if least > budget:
        msg = f"the cheapest choice of every unit costs {least}, more than the budget {budget}"
        raise TunerError(msg)
    points, slope = _sweep(units, budget)
    start = _filled(units, points[-1].picks, budget)
    return _exact(units, budget, start, slope)


def front(units: Sequence[Choices]) -> list[Solution]:
    """Return the solutions of the sweep, cheapest first: the convex hull of the Pareto front."""
    return _sweep(units, sum(max(u.costs) for u in units))[0]


def hull(choices: Choices) -> list[int]:
    """Return the options on the lower convex hull of (cost, loss), cheapest first."""
    order = sorted(
        range(len(choices.costs)), key=lambda i: (choices.costs[i], choices.losses[i], i)
    )
    out: list[int] = []
    for i in order:
        if out and choices.losses[i] >= choices.losses[out[-1]]:
            continue
        while len(out) > 1 and _slope(choices, out[-2], out[-1]) <= _slope(choices, out[-1], i):
            out.pop()
        out.append(i)
    return out


def _slope(choices: Choices, a: int, b: int) -> float:
    """Return the loss saved per unit of cost from one option to a dearer one."""
    return (choices.losses[a] - choices.losses[b]) / (choices.costs[b] - choices.costs[a])


def _sweep(units: Sequence[Choices], budget: int) -> tuple[list[Solution], float]:
    """Return the solutions up to the first step that exceeds the budget, and that step's slope.

    The slope is the Lagrangian multiplier at which the relaxation is tight; 0 when all steps fit.
    """
    hulls = [hull(u) for u in units]
    picks = [h[0] for h in hulls]
    steps = [
        (-_slope(units[n], a, b), n, b)
        for n, h in enumerate(hulls)
        for a, b in zip(h, h[1:], strict=False)
    ]
    steps.sort()
    points = [_solution(units, picks)]
    for negative, n, option in steps:
        dearer = points[-1].cost + units[n].costs[option] - units[n].costs[picks[n]]
        if dearer > budget:
            return points, -negative
        picks[n] = option
        points.append(_solution(units, picks))
    return points, 0.0


def _solution(units: Sequence[Choices], picks: Sequence[int], bound: float = 0.0) -> Solution:
    cost = sum(u.costs[p] for u, p in zip(units, picks, strict=True))
    loss = sum(u.losses[p] for u, p in zip(units, picks, strict=True))
    return Solution(tuple(picks), cost, loss, bound)


def _filled(units: Sequence[Choices], start: Sequence[int], budget: int) -> Solution:
    """Return the solution with what is left of the budget spent, best saving first."""
    picks = list(start)
    left = budget - _solution(units, picks).cost
    while True:
        gains = [
            (u.losses[picks[n]] - u.losses[o], n, o)
            for n, u in enumerate(units)
            for o in range(len(u.costs))
            if u.costs[o] - u.costs[picks[n]] <= left and u.losses[o] < u.losses[picks[n]]
        ]
        if not gains:
            return _solution(units, picks)
        _, n, option = max(gains)
        left -= units[n].costs[option] - units[n].costs[picks[n]]
        picks[n] = option


def _exact(units: Sequence[Choices], budget: int, start: Solution, slope: float) -> Solution:
    """Return the optimum, by dynamic programming with the bound at multiplier `slope`."""
    relaxed = [
        min(loss + slope * cost for cost, loss in zip(u.costs, u.losses, strict=True))
        for u in units
    ]
    lowest = sum(relaxed) - slope * budget
    if start.loss <= lowest + _SLACK * max(1.0, abs(lowest)):
        return _solution(units, start.picks, start.loss)
    cheapest = [min(u.costs) for u in units]
    cost = torch.zeros(1, dtype=torch.int64)
    loss = torch.zeros(1, dtype=torch.float64)
    trail: list[tuple[Tensor, Tensor]] = []
    dropped = float("inf")
    for n, unit in enumerate(units):
        rest_cost, rest = sum(cheapest[n + 1 :]), sum(relaxed[n + 1 :])
        cost, loss, parent, option = _extended(cost, loss, unit)
        bound = loss + slope * cost + (rest - slope * budget)
        keep = (cost + rest_cost <= budget) & (bound < start.loss)
        cost, loss, parent, option, bound = (t[keep] for t in (cost, loss, parent, option, bound))
        keep = _undominated(cost, loss)
        if len(keep) > MAX_STATES:
            order = bound[keep].argsort(stable=True)
            dropped = min(dropped, float(bound[keep][order[MAX_STATES]]))
            keep = keep[order[:MAX_STATES].sort().values]
        cost, loss = cost[keep], loss[keep]
        trail.append((parent[keep], option[keep]))
    if not len(loss) or float(loss.min()) >= start.loss:
        return _solution(units, start.picks, min(start.loss, dropped))
    picks: list[int] = []
    at = int(loss.argmin())
    for parent, option in reversed(trail):
        picks.append(int(option[at]))
        at = int(parent[at])
    best = _solution(units, picks[::-1])
    return _solution(units, best.picks, min(best.loss, dropped))


def _extended(cost: Tensor, loss: Tensor, unit: Choices) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return every partial solution with every option of one more unit, sorted by cost."""
    states, options = len(cost), len(unit.costs)
    costs = (cost[:, None] + torch.tensor(unit.costs, dtype=torch.int64)).reshape(-1)
    losses = (loss[:, None] + torch.tensor(unit.losses, dtype=torch.float64)).reshape(-1)
    parent = torch.arange(states).repeat_interleave(options)
    option = torch.arange(options).repeat(states)
    order = losses.argsort(stable=True)
    order = order[costs[order].argsort(stable=True)]
    return costs[order], losses[order], parent[order], option[order]


def _undominated(cost: Tensor, loss: Tensor) -> Tensor:
    """Return the indices that lose less than all that cost no more; `cost` is sorted."""
    if not len(cost):
        return torch.zeros(0, dtype=torch.int64)
    before = torch.cat([torch.full((1,), torch.inf, dtype=loss.dtype), loss.cummin(0).values[:-1]])
    return (loss < before).nonzero().squeeze(1)
