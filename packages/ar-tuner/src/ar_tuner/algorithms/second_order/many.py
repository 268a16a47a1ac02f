"""The solver for many small weights at once, each with a curvature of its own: experts.

The same steps as `sweep` and `descend`, column by column, but for all experts in one operation:
with 64 of them a column costs about what it costs for one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels import data_type
from ar_kernels.numerics import Columnwise, Params
from ar_tuner.algorithms.second_order.descent import ENOUGH
from ar_tuner.algorithms.second_order.grid import Grid
from ar_tuner.algorithms.second_order.refit import refit, refits
from ar_tuner.algorithms.second_order.solve import Solution, solve, start
from ar_tuner.algorithms.second_order.sweep import PANEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_tuner.algorithms.second_order.curvature import Curvature
    from ar_tuner.algorithms.second_order.solve import Problem

    Problems = Sequence[Sequence[Problem]]


def solve_many(
    problems: Problems, curvatures: Sequence[Curvature], *, cycles: int
) -> list[list[Solution]]:
    """Return the solutions of the weights of each expert, in order.

    Args:
        problems: by expert, its weights that share their input.
        curvatures: by expert.
        cycles: passes over all columns at most.
    """
    if not _alike(problems):
        pairs = zip(problems, curvatures, strict=True)
        return [solve(mine, curvature, cycles=cycles) for mine, curvature in pairs]
    starts = [[start(p, c) for p in mine] for mine, c in zip(problems, curvatures, strict=True)]
    spec = problems[0][0].spec
    shapes = tuple((p.goal.shape[0], p.goal.shape[1]) for p in problems[0])
    grids = [Grid(spec, tuple(s[0] for s in mine), shapes) for mine in starts]
    goals = [torch.cat([p.goal for p in mine]) for mine in problems]
    if not all(_plain(grid) for grid in grids):
        pairs = zip(problems, curvatures, strict=True)
        return [solve(mine, curvature, cycles=cycles) for mine, curvature in pairs]
    values = _sweep(goals, grids, curvatures)
    for i, (goal, grid, h) in enumerate(zip(goals, grids, curvatures, strict=True)):
        near = grid.rounded(goal)
        worse = h.error(goal - values[i]) > h.error(goal - near)
        values[i] = torch.where(worse.unsqueeze(-1), near, values[i])
    values = _descend(goals, values, grids, curvatures, cycles=cycles)
    heights = [shape[0] for shape in shapes]
    if all(refits(spec, p) for grid in grids for p in grid.params):
        for i, (goal, grid, h) in enumerate(zip(goals, grids, curvatures, strict=True)):
            triples = zip(goal.split(heights), values[i].split(heights), grid.params, strict=True)
            fitted = [refit(g, v, spec, p, gram=h.gram) for g, v, p in triples]
            values[i] = torch.cat([v for v, _ in fitted])
            grids[i] = Grid(spec, tuple(p for _, p in fitted), shapes)
        values = _descend(goals, values, grids, curvatures, cycles=1)
    kind = data_type(spec.data_type)
    out = []
    for i, (mine, h) in enumerate(zip(problems, curvatures, strict=True)):
        parts = zip(mine, grids[i].params, values[i].split(heights), starts[i], strict=True)
        out.append(
            [
                Solution(
                    kind.quantize(value, spec, params),
                    float(h.error(problem.goal - value).sum()),
                    searched,
                    plain,
                )
                for problem, params, value, (_, searched, plain) in parts
            ]
        )
    return out


def _alike(problems: Problems) -> bool:
    """Tell whether all experts have weights of the same shapes, in one columnwise spec."""
    first = [(p.spec, p.goal.shape) for p in problems[0]]
    same = all([(p.spec, p.goal.shape) for p in mine] == first for mine in problems)
    one = len({p.spec for p in problems[0]}) == 1
    return same and one and isinstance(data_type(first[0][0].data_type), Columnwise)


def _plain(grid: Grid) -> bool:
    """Tell whether all parameters have a value for each scale: none is of a whole weight."""
    return all(v.shape == p.scale.shape for p in grid.params for v in p.extra.values())


def _columns(
    grids: Sequence[Grid], curvatures: Sequence[Curvature], first: int, last: int
) -> list[Params]:
    """Return the parameters of a panel, one `Params` of [E * O] tensors for each column."""
    by_expert = [
        grid.columns(h.order[first:last]) for grid, h in zip(grids, curvatures, strict=True)
    ]
    out = []
    for own in zip(*by_expert, strict=True):
        zeros = [p.zero_point for p in own if p.zero_point is not None]
        extra = {name: torch.cat([p.extra[name] for p in own]) for name in own[0].extra}
        scale = torch.cat([p.scale for p in own])
        out.append(Params(scale, torch.cat(zeros) if zeros else None, extra))
    return out


def _ordered(weights: Sequence[Tensor], curvatures: Sequence[Curvature]) -> Tensor:
    """Return weights [O, I] by expert as [I, E, O], the columns of each in its own order."""
    pairs = zip(weights, curvatures, strict=True)
    return torch.stack([w.float().t()[h.order] for w, h in pairs], 1).contiguous()


def _stored(columns: Tensor, curvatures: Sequence[Curvature]) -> list[Tensor]:
    """Return the inverse of `_ordered`."""
    out = []
    for i, h in enumerate(curvatures):
        made = torch.empty_like(columns[:, i])
        made[h.order] = columns[:, i]
        out.append(made.t().contiguous())
    return out


def _panels(count: int) -> list[tuple[int, int]]:
    return [(i, min(i + PANEL, count)) for i in range(0, count, PANEL)]


def _spread(matrices: Tensor, changes: Tensor) -> Tensor:
    """Return [n, E, O]: matrices [E, n, k] times changes [k, E, O]."""
    return torch.bmm(matrices, changes.transpose(0, 1)).transpose(0, 1)


def _sweep(
    goals: Sequence[Tensor], grids: Sequence[Grid], curvatures: Sequence[Curvature]
) -> list[Tensor]:
    left = _ordered(goals, curvatures)
    upper = torch.stack([h.upper for h in curvatures])  # [E, I, I]
    for first, last in _panels(left.shape[0]):
        params = _columns(grids, curvatures, first, last)
        panel = left[first:last]
        inner = upper[:, first:last, first:last].permute(1, 2, 0).unsqueeze(-1)  # [n, n, E, 1]
        errors = torch.empty_like(panel)
        for j, own in enumerate(params):
            wanted = panel[j].clone()
            panel[j] = grids[0].nearest(wanted.flatten(), own).view_as(wanted)
            torch.div(wanted - panel[j], inner[j, j], out=errors[j])
            panel[j + 1 :].addcmul_(inner[j, j + 1 :], errors[j].unsqueeze(0), value=-1)
        left[last:] -= _spread(upper[:, first:last, last:].transpose(1, 2), errors)
    return _stored(left, curvatures)


def _descend(
    goals: Sequence[Tensor],
    values: Sequence[Tensor],
    grids: Sequence[Grid],
    curvatures: Sequence[Curvature],
    *,
    cycles: int,
) -> list[Tensor]:
    now, wanted = _ordered(values, curvatures), _ordered(goals, curvatures)
    gram = torch.stack([h.ordered for h in curvatures])  # [E, I, I]
    pull = _spread(gram, wanted - now).contiguous()
    before = float(((wanted - now) * pull).sum(dtype=torch.float64))
    panels = _panels(now.shape[0])
    params = [_columns(grids, curvatures, first, last) for first, last in panels]
    for _ in range(cycles):
        for (first, last), own in zip(panels, params, strict=True):
            inner = gram[:, first:last, first:last].permute(1, 2, 0).unsqueeze(-1)
            moved = _panel(now[first:last], pull[first:last].clone(), own, grids[0], inner)
            pull -= _spread(gram[:, :, first:last], moved)
        after = float(((wanted - now) * pull).sum(dtype=torch.float64))
        if before - after <= ENOUGH * before:
            break
        before = after
    return _stored(now, curvatures)


def _panel(now: Tensor, pull: Tensor, params: list[Params], grid: Grid, gram: Tensor) -> Tensor:
    """Move each column of a panel (in place) and return by how much, [n, E, O]."""
    begin = now.clone()
    for j, own in enumerate(params):
        old, step = now[j].clone(), pull[j] / gram[j, j]
        best = grid.nearest((old + step).flatten(), own).view_as(old)
        # a tie keeps the old value, so that a cycle ends where nothing improves
        now[j] = torch.where((best - old - step).abs() < step.abs(), best, old)
        pull.addcmul_(gram[:, j], (now[j] - old).unsqueeze(0), value=-1)
    return now - begin
