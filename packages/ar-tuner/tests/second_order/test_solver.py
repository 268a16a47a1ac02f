"""The sweep, the descent and the refit."""

from __future__ import annotations

import pytest
import torch

from ar_kernels import data_type
from ar_schemes import scheme
from ar_tuner.algorithms.second_order.curvature import curvature
from ar_tuner.algorithms.second_order.descent import descend
from ar_tuner.algorithms.second_order.grid import Grid
from ar_tuner.algorithms.second_order.refit import refit
from ar_tuner.algorithms.second_order.solve import Problem, solve
from ar_tuner.algorithms.second_order.sweep import sweep

WIDTH, HIDDEN = 64, 256


def slow_sweep(goal, spec, params, h) -> torch.Tensor:
    """One column after the other with a fresh inverse of what is left."""
    kind, out, left = data_type(spec.data_type), torch.zeros_like(goal), goal.double().clone()
    n = len(h.order)
    damped = h.gram.double() + h.damping * h.gram.diagonal().double().mean() * torch.eye(n).double()
    rest = h.order.tolist()
    while rest:
        column = rest[0]
        out[:, column] = kind.fake_quant(left.float(), spec, params)[:, column]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        error = left[:, column] - out[:, column]
        left[:, rest] -= error.outer(inverse[0] / inverse[0, 0])
        rest = rest[1:]
    return out


@pytest.mark.parametrize("name", ["W3A16", "NVFP4", "GGUF:Q2_K_S"])
def test_the_sweep_is_optimal_brain_quantization_in_order_of_energy(
    name, spec_of, second_moment, weight, j
) -> None:
    goal, spec = weight(6), spec_of(name)
    h = curvature(second_moment(), 0.02)
    params = data_type(spec.data_type).parameters(goal, spec)
    fast = sweep(goal, Grid(spec, (params,), ((6, HIDDEN),)), h)
    slow = slow_sweep(goal, spec, params, h)
    assert (fast != slow).float().mean() < 0.01  # float32 against float64 at a tie
    assert j(goal - fast, h.gram) == pytest.approx(j(goal - slow, h.gram), rel=0.02)


@pytest.mark.parametrize("name", ["W2A16", "MXFP4", "GGUF:Q3_K_S"])
def test_every_cycle_of_descent_lowers_the_error_until_no_single_change_does(
    name, spec_of, second_moment, weight, j
) -> None:
    goal, spec = weight(8), spec_of(name)
    kind, gram = data_type(spec.data_type), second_moment()
    h, params = curvature(gram, 0.01), kind.parameters(goal, spec)
    grid = Grid(spec, (params,), ((8, HIDDEN),))
    values = grid.rounded(goal)
    errors = [j(goal - values, gram)]
    for _ in range(60):
        before, values = values, descend(goal, values, grid, h, cycles=1)
        errors.append(j(goal - values, gram))
        if torch.equal(before, values):
            break
    assert all(b <= a * (1 + 1e-6) for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.8 * errors[0]
    pull = (goal - values) @ gram
    best = kind.fake_quant(values + pull / gram.diagonal(), spec, params)
    moved = best - values
    gain = moved * (2 * pull - moved * gram.diagonal())
    assert float(gain.max()) < 1e-4 * errors[-1]


@pytest.mark.parametrize("name", ["W2A16", "W4A16", "NVFP4", "GGUF:Q4_0", "GGUF:Q4_1", "FP8_BLOCK"])
def test_fitted_scales_lower_the_error_and_keep_the_codes(
    name, spec_of, second_moment, weight, j
) -> None:
    rows = 128 if name == "FP8_BLOCK" else 24
    goal, spec, gram = weight(rows), spec_of(name), second_moment()
    kind = data_type(spec.data_type)
    params = kind.parameters(goal, spec)
    values = kind.fake_quant(goal, spec, params)
    new, fitted = refit(goal, values, spec, params, gram=gram)
    assert j(goal - new, gram) <= j(goal - values, gram) * (1 + 1e-6)
    again = kind.quantize(new, spec, fitted)
    assert torch.equal(again.dequantize(), new)
    before = kind.quantize(values, spec, params)
    assert torch.equal(again.codes, before.codes)
    if name == "W2A16":
        assert j(goal - new, gram) < 0.95 * j(goal - values, gram)


def test_codes_are_in_storage_order_whatever_the_order_of_the_sweep(
    spec_of, second_moment, weight
) -> None:
    goal, gram = weight(), second_moment()
    shuffle = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(2))
    spec = spec_of("W4A16").with_(granularity=scheme("INT4").weight.granularity)
    straight = solve([Problem(goal, spec)], curvature(gram, 0.01), cycles=2)[0].weight
    shuffled = solve(
        [Problem(goal[:, shuffle], spec)], curvature(gram[shuffle][:, shuffle], 0.01), cycles=2
    )[0].weight
    # one scale per row: the solution of shuffled columns is the shuffled solution
    same = (straight.codes[:, shuffle] == shuffled.codes).float().mean()
    assert same > 0.98
    assert torch.equal(straight.scale, shuffled.scale)


def test_weights_solved_together_equal_each_alone(spec_of, second_moment, weight) -> None:
    h = curvature(second_moment(), 0.01)
    a, b, c = (
        Problem(weight(8) * f, spec_of(n)) for f, n in ((1, "W3A16"), (2, "W4A16"), (3, "W3A16"))
    )
    together = solve([a, b, c], h, cycles=2)
    for problem, found in zip((a, b, c), together, strict=True):
        (alone,) = solve([problem], h, cycles=2)
        assert (alone.weight.codes == found.weight.codes).float().mean() > 0.99
        assert found.error == pytest.approx(alone.error, rel=1e-3)


def test_a_weight_on_the_grid_stays(spec_of, second_moment, weight, j) -> None:
    spec, kind = spec_of("W4A16"), data_type("int")
    goal = weight()
    once = kind.quantize(goal, spec, kind.parameters(goal, spec)).dequantize()
    (found,) = solve([Problem(once, spec)], curvature(second_moment(), 0.01), cycles=2)
    assert found.error <= 1e-6 * j(goal, second_moment())
