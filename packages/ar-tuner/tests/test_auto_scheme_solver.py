from __future__ import annotations

import itertools
import random

import pytest

from ar_tuner import TunerError
from ar_tuner.auto_scheme import solver
from ar_tuner.auto_scheme.solver import Choices, front, hull, solve


def instance(seed: int, units: int = 5, options: int = 4) -> list[Choices]:
    draw = random.Random(seed)
    out = []
    for _ in range(units):
        n = draw.randint(1, options)
        costs = tuple(draw.choice((5, 9, 17, 18, 33, draw.randint(1, 60))) for _ in range(n))
        out.append(Choices(costs, tuple(draw.random() / c for c in costs)))
    return out


def brute_force(units: list[Choices], budget: int) -> float:
    return min(
        sum(u.losses[p] for u, p in zip(units, picks, strict=True))
        for picks in itertools.product(*(range(len(u.costs)) for u in units))
        if sum(u.costs[p] for u, p in zip(units, picks, strict=True)) <= budget
    )


@pytest.mark.parametrize("seed", range(40))
def test_a_solution_is_the_optimum_of_brute_force(seed: int) -> None:
    units = instance(seed)
    low, high = sum(min(u.costs) for u in units), sum(max(u.costs) for u in units)
    for budget in (low, (2 * low + high) // 3, (low + high) // 2, high + 1):
        found = solve(units, budget)
        assert found.cost <= budget
        assert found.loss == pytest.approx(brute_force(units, budget), rel=1e-12)
        assert found.bound == pytest.approx(found.loss)
        assert found.cost == sum(u.costs[p] for u, p in zip(units, found.picks, strict=True))


def test_a_budget_below_the_cheapest_is_refused() -> None:
    with pytest.raises(TunerError, match="costs 9, more than the budget 8"):
        solve([Choices((4, 8), (1.0, 0.0)), Choices((5,), (0.0,))], 8)


def test_the_front_is_convex_and_each_point_is_optimal_for_its_cost() -> None:
    units = instance(3)
    points = front(units)
    slopes = [(a.loss - b.loss) / (b.cost - a.cost) for a, b in itertools.pairwise(points)]
    assert slopes == sorted(slopes, reverse=True)
    for point in points:
        assert point.loss == pytest.approx(brute_force(units, point.cost), rel=1e-12)


def test_a_hull_leaves_out_options_that_are_dearer_and_no_better() -> None:
    # 20 loses more than 10 does, 30 lies above the line from 10 to 40
    assert hull(Choices((10, 20, 30, 40), (1.0, 1.5, 0.9, 0.0))) == [0, 3]


def test_many_states_are_cut_with_an_honest_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "MAX_STATES", 2)
    seeds = range(30)
    for seed in seeds:
        units = instance(seed, units=7)
        budget = sum(min(u.costs) for u in units) + 40
        best = brute_force(units, budget)
        found = solve(units, budget)
        assert found.cost <= budget
        assert found.bound <= best * (1 + 1e-12) <= found.loss * (1 + 2e-12)


def test_large_instances_are_solved_at_once() -> None:
    draw = random.Random(0)
    units = []
    for _ in range(400):
        weights = draw.choice((1 << 22, 3 << 22, 11 << 20))
        costs = tuple(weights * bits // 64 for bits in (17, 33, 66))
        base = draw.random() * weights
        units.append(Choices(costs, (base, base / draw.uniform(6, 20), base / 4000)))
    budget = sum(u.costs[0] for u in units) * 14 // 10
    found = solve(units, budget)
    assert found.loss == pytest.approx(found.bound, rel=1e-6)
    assert found == solve(units, budget)


def test_equal_units_give_equal_solutions_twice() -> None:
    units = [Choices((1, 2), (1.0, 0.5))] * 6
    assert solve(units, 9) == solve(units, 9)
