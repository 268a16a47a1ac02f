"""From a weight and the curvature of its error to a quantized weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels import data_type
from ar_kernels.numerics import Columnwise
from ar_tuner.algorithms.second_order.descent import descend
from ar_tuner.algorithms.second_order.grid import Grid
from ar_tuner.algorithms.second_order.refit import refit, refits
from ar_tuner.algorithms.second_order.sweep import sweep

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_kernels.numerics import Params
    from ar_schemes import TensorSpec
    from ar_tuner.algorithms.second_order.curvature import Curvature


@dataclass(frozen=True)
class Problem:
    """One weight to solve for.

    Attributes:
        goal: float32 [O, I], what the quantized weight should be near.
        spec: representation.
        shared: parameters held in common with other layers.
    """

    goal: Tensor
    spec: TensorSpec
    shared: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Solution:
    """A solved weight, and J of it, of searched scales and of plain ones, rounded to nearest."""

    weight: QuantizedWeight
    error: float
    searched: float
    plain: float


def solve(problems: Sequence[Problem], curvature: Curvature, *, cycles: int) -> list[Solution]:
    """Return the solutions of weights that share their input, in order.

    Weights of one spec are solved together: rows know nothing of each other.
    """
    done: dict[int, Solution] = {}
    for members in _bundles(problems):
        chosen = [problems[i] for i in members]
        for i, solution in zip(members, _together(chosen, curvature, cycles), strict=True):
            done[i] = solution
    return [done[i] for i in range(len(problems))]


def start(problem: Problem, curvature: Curvature) -> tuple[Params, float, float]:
    """Return parameters to commit to, J of searched and of plain ones rounded to nearest."""
    kind, spec, goal = data_type(problem.spec.data_type), problem.spec, problem.goal
    plain = kind.parameters(goal, spec, shared=problem.shared)
    found = kind.search(goal, spec, importance=curvature.diagonal, shared=problem.shared)
    errors = [
        float(curvature.error(goal - kind.fake_quant(goal, spec, p)).sum()) for p in (found, plain)
    ]
    if errors[1] < errors[0]:
        return plain, errors[1], errors[1]
    return found, errors[0], errors[1]


def _bundles(problems: Sequence[Problem]) -> list[list[int]]:
    bundles: dict[object, list[int]] = {}
    for i, problem in enumerate(problems):
        able = isinstance(data_type(problem.spec.data_type), Columnwise)
        bundles.setdefault(problem.spec if able else i, []).append(i)
    return list(bundles.values())


def _together(problems: Sequence[Problem], curvature: Curvature, cycles: int) -> list[Solution]:
    spec = problems[0].spec
    starts = [start(p, curvature) for p in problems]
    shapes = tuple((p.goal.shape[0], p.goal.shape[1]) for p in problems)
    goal = torch.cat([p.goal for p in problems])
    grid = Grid(spec, tuple(s[0] for s in starts), shapes)
    values = sweep(goal, grid, curvature)
    near = grid.rounded(goal)
    worse = curvature.error(goal - values) > curvature.error(goal - near)
    values = torch.where(worse.unsqueeze(-1), near, values)
    values, params = improve(goal, values, grid, curvature, cycles=cycles)
    kind = data_type(spec.data_type)
    out = []
    for problem, own, value, (_, searched, plain) in zip(
        problems, params, values.split([s[0] for s in shapes]), starts, strict=True
    ):
        error = float(curvature.error(problem.goal - value).sum())
        out.append(Solution(kind.quantize(value, spec, own), error, searched, plain))
    return out


def improve(
    goal: Tensor, values: Tensor, grid: Grid, curvature: Curvature, *, cycles: int
) -> tuple[Tensor, tuple[Params, ...]]:
    """Return (values, params) with J no larger: descent, fitted scales, one more cycle."""
    values = descend(goal, values, grid, curvature, cycles=cycles)
    if not all(refits(grid.spec, p) for p in grid.params):
        return values, grid.params
    heights = [shape[0] for shape in grid.shapes]
    parts = [
        refit(g, v, grid.spec, p, gram=curvature.gram)
        for g, v, p in zip(goal.split(heights), values.split(heights), grid.params, strict=True)
    ]
    fitted = Grid(grid.spec, tuple(p for _, p in parts), grid.shapes)
    values = torch.cat([v for v, _ in parts])
    return descend(goal, values, fitted, curvature, cycles=1), fitted.params
