"""What a layer's weight should become, given the errors before it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ar_tuner.algorithms.second_order import Knobs
from ar_tuner.algorithms.second_order.goal import goals
from ar_tuner.algorithms.second_order.statistics import Gap, Moments, Statistics


def drifted(correlated) -> tuple[torch.Tensor, torch.Tensor, Statistics]:
    """Return float inputs, drifted inputs and their statistics."""
    x0 = correlated(4, 256, 32).reshape(-1, 32)
    noise = 0.3 * correlated(4, 256, 32, seed=4).reshape(-1, 32)
    x = x0 + noise

    def moments(x0, x):
        return Moments(x.t() @ x / len(x), (x0 - x).t() @ x / len(x), len(x))

    return x0, x, Statistics(Gap.INPUT, *[moments(x0, x)] * 3)


def test_the_goal_makes_up_for_errors_of_earlier_layers(correlated, weight) -> None:
    x0, x, seen = drifted(correlated)
    w = weight(8, 32)
    (still,) = goals([w], seen, Knobs(pull=0.0))
    (full,) = goals([w], seen, Knobs(ridge=0.0))
    assert torch.equal(still.weight, w)
    assert full.share == pytest.approx(1, abs=1e-3)
    least = torch.linalg.lstsq(x.double(), (x0 @ w.t()).double()).solution.t()
    torch.testing.assert_close(full.weight.double(), least, rtol=1e-2, atol=1e-3)


def test_a_move_that_does_not_help_held_out_rows_is_not_made(correlated, weight) -> None:
    _, _, seen = drifted(correlated)
    assert seen.held is not None
    against = dataclasses.replace(seen, held=Moments(seen.held.gram, -seen.held.gap, 1))
    w = weight(8, 32)
    (goal,) = goals([w], against, Knobs())
    assert goal.share == 0
    assert torch.equal(goal.weight, w)
    half = dataclasses.replace(seen, held=Moments(seen.held.gram * 2, seen.held.gap, 1))
    assert goals([w], half, Knobs(ridge=0.0))[0].share == pytest.approx(0.5, abs=1e-3)


def test_what_is_lacking_is_divided_by_how_much_of_it_is_added(correlated, weight) -> None:
    x = correlated(4, 64, 32).reshape(-1, 32)
    lacks = x @ weight(8, 32).t()
    moments = Moments(x.t() @ x / len(x), lacks.t() @ x / len(x), len(x))
    seen = Statistics(Gap.OUTPUT, moments, None, None)
    (goal,) = goals([torch.zeros(8, 32)], seen, Knobs(ridge=0.0), added=0.5)
    torch.testing.assert_close(goal.weight, 2 * weight(8, 32), rtol=1e-2, atol=1e-3)
