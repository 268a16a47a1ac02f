from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ar_kernels import data_type, equal
from ar_kernels.numerics import Params
from ar_schemes import scheme
from ar_tuner import TunerError
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.algorithms.rtn import Rtn
from ar_tuner.algorithms.second_order import Knobs, SecondOrder, polish, starting_params
from ar_tuner.algorithms.second_order.curvature import curvature
from ar_tuner.algorithms.second_order.descent import descend
from ar_tuner.algorithms.second_order.goal import goals
from ar_tuner.algorithms.second_order.grid import Grid
from ar_tuner.algorithms.second_order.refit import refit
from ar_tuner.algorithms.second_order.sequencing import layer_groups
from ar_tuner.algorithms.second_order.solve import Problem, solve, start
from ar_tuner.algorithms.second_order.statistics import Gap, Moments, Statistics, collect
from ar_tuner.algorithms.second_order.sweep import sweep
from ar_tuner.algorithms.second_order.tracing import added_share, trace
from ar_tuner.parts import WeightRef
from ar_tuner.registry import algorithm
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call

WIDTH, HIDDEN = 64, 256
SCHEMES = ["W4A16", "W3A16", "W2A16", "MXFP4", "MXINT4", "NVFP4", "NVFP4_E5M3", "FPW8A16"]
K_TYPES = ["GGUF:Q2_K_S", "GGUF:Q3_K_S", "GGUF:Q4_K_S", "GGUF:Q6_K"]
LEGACY = ["GGUF:Q4_0", "GGUF:Q4_1", "GGUF:Q5_0", "GGUF:Q5_1"]
EVERY = [*SCHEMES, *LEGACY, *K_TYPES]


class Block(nn.Module):
    """A block in the shape of a decoder's: q and k share an input, o comes after, then an MLP."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.down = nn.Linear(2 * width, width, bias=False)  # registered first, called last
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x):
        mixed = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2) / x.shape[-1] ** 0.5, -1) @ x
        x = x + self.o(mixed)
        return (x + self.down(torch.nn.functional.silu(self.up(x))),)


def correlated(rows: int, tokens: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """Return inputs [rows, tokens, width] with neighbours alike and some channels strong."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=g) * torch.linspace(0.1, 2, width)
    return torch.randn(rows, tokens, width, generator=g) @ mixing / width**0.5


def task(
    name: str = "W3A16",
    *,
    width: int = WIDTH,
    overrides: dict | None = None,
    layers: tuple[str, ...] = ("q", "k", "o", "up", "down"),
    noise: float = 0.0,
) -> BlockTask:
    torch.manual_seed(3)
    block = Block(width).requires_grad_(requires_grad=False)
    floats = correlated(16, 16, width)
    given = floats + noise * correlated(16, 16, width, seed=9)
    chosen = scheme(name)
    if chosen.weight is not None and chosen.weight.data_type == "int":
        chosen = chosen.with_overrides({"group_size": 32, **(overrides or {})})
    targets = tuple(
        Target(WeightRef(f"b.{n}", f"{n}.weight", transposed=False), chosen) for n in layers
    )
    return BlockTask(
        block=block,
        name="b",
        targets=targets,
        inputs=RowBank.of([Call(0, (x,), {}) for x in given.split(4)], [4] * 4),
        reference=rows_of([block(x)[0] for x in floats.split(4)]),
        settings=TuneSettings(iters=3, batch_size=4),
        report=lambda *_: None,
        float_inputs=RowBank.of([Call(0, (x,), {}) for x in floats.split(4)], [4] * 4),
    )


def spec_of(name: str, **changes):
    found = scheme(name).weight
    assert found is not None
    return found.with_(**changes)


def second_moment(width: int = HIDDEN) -> torch.Tensor:
    x = correlated(4, 256, width).reshape(-1, width)
    return x.t() @ x / len(x)


def weight(rows: int = 24, width: int = HIDDEN) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(7)) * 0.1


def j(difference: torch.Tensor, gram: torch.Tensor) -> float:
    """Return trace(E H E^T), the slow way."""
    e = difference.double()
    return float((e @ gram.double() @ e.t()).trace())


# --- what a data type gives ------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_solved_is_no_worse_than_searched_and_searched_than_plain(name) -> None:
    gram, goal, spec = second_moment(), weight(), spec_of(name)
    kind = data_type(spec.data_type)
    (found,) = solve([Problem(goal, spec)], curvature(gram, 0.01), cycles=3)
    assert found.error <= found.searched <= found.plain
    assert found.error == pytest.approx(j(goal - found.weight.dequantize(), gram), rel=1e-3)
    plain = kind.fake_quant(goal, spec, kind.parameters(goal, spec))
    assert found.plain == pytest.approx(j(goal - plain, gram), rel=1e-3)
    assert found.error < 0.7 * found.plain


@pytest.mark.parametrize("name", EVERY)
def test_committed_parameters_hold_every_value_exactly(name) -> None:
    gram, goal, spec = second_moment(), weight(), spec_of(name)
    kind, h = data_type(spec.data_type), curvature(second_moment(), 0.01)
    params = kind.search(goal, spec, importance=gram.diagonal())
    values = sweep(goal, Grid(spec, (params,), (tuple(goal.shape),)), h)
    assert torch.equal(kind.quantize(values, spec, params).dequantize(), values)


@pytest.mark.parametrize("name", K_TYPES)
def test_committed_scales_of_super_groups_are_untouched(name) -> None:
    goal, spec = weight(), spec_of(name)
    kind, h = data_type(spec.data_type), curvature(second_moment(), 0.01)
    params = start(Problem(goal, spec), h)[0]
    committed = kind.quantize(goal, spec, params)
    (found,) = solve([Problem(goal, spec)], h, cycles=3)
    assert torch.equal(found.weight.scale, committed.scale)
    assert all(torch.equal(v, committed.extra[k]) for k, v in found.weight.extra.items())
    assert not torch.equal(found.weight.codes, committed.codes)


def test_any_data_type_is_served_through_its_fake_quant() -> None:
    class Foreign:
        """The integers, without what solvers may be given beside `DataType`."""

        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            if name in ("nearest", "params_of"):
                raise AttributeError(name)
            return getattr(self._inner, name)

    from ar_kernels.numerics import column_params, nearest

    spec = spec_of("W3A16", scale_dtype="float16")
    kind, goal = data_type("int"), weight()
    params = kind.parameters(goal, spec)
    columns = torch.tensor([5, 200])
    own = column_params(params, spec, tuple(goal.shape), columns)
    found = [nearest(goal[:, columns], spec, own, kind=k) for k in (kind, Foreign(kind))]
    assert torch.equal(*found)


# --- the solver ------------------------------------------------------------------------------


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
def test_the_sweep_is_optimal_brain_quantization_in_order_of_energy(name) -> None:
    goal, spec = weight(6), spec_of(name)
    h = curvature(second_moment(), 0.02)
    params = data_type(spec.data_type).parameters(goal, spec)
    fast = sweep(goal, Grid(spec, (params,), ((6, HIDDEN),)), h)
    slow = slow_sweep(goal, spec, params, h)
    assert (fast != slow).float().mean() < 0.01  # float32 against float64 at a tie
    assert j(goal - fast, h.gram) == pytest.approx(j(goal - slow, h.gram), rel=0.02)


@pytest.mark.parametrize("name", ["W2A16", "MXFP4", "GGUF:Q3_K_S"])
def test_every_cycle_of_descent_lowers_the_error_until_no_single_change_does(name) -> None:
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
def test_fitted_scales_lower_the_error_and_keep_the_codes(name) -> None:
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


def test_codes_are_in_storage_order_whatever_the_order_of_the_sweep() -> None:
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


def test_weights_solved_together_equal_each_alone() -> None:
    h = curvature(second_moment(), 0.01)
    a, b, c = (
        Problem(weight(8) * f, spec_of(n)) for f, n in ((1, "W3A16"), (2, "W4A16"), (3, "W3A16"))
    )
    together = solve([a, b, c], h, cycles=2)
    for problem, found in zip((a, b, c), together, strict=True):
        (alone,) = solve([problem], h, cycles=2)
        assert (alone.weight.codes == found.weight.codes).float().mean() > 0.99
        assert found.error == pytest.approx(alone.error, rel=1e-3)


def test_a_weight_on_the_grid_stays() -> None:
    spec, kind = spec_of("W4A16"), data_type("int")
    goal = weight()
    once = kind.quantize(goal, spec, kind.parameters(goal, spec)).dequantize()
    (found,) = solve([Problem(once, spec)], curvature(second_moment(), 0.01), cycles=2)
    assert found.error <= 1e-6 * j(goal, second_moment())


# --- the matrix ------------------------------------------------------------------------------


def test_silent_channels_are_rounded_to_nearest() -> None:
    gram, goal, spec = second_moment(), weight(), spec_of("W4A16")
    gram[[3, 140], :] = 0
    gram[:, [3, 140]] = 0
    (found,) = solve([Problem(goal, spec)], curvature(gram, 0.01), cycles=2)
    near = data_type("int")
    again = near.quantize(goal, spec, Params(found.weight.scale.float()))
    assert torch.equal(found.weight.codes[:, [3, 140]], again.codes[:, [3, 140]])


def test_a_matrix_of_zeros_means_rounding_to_nearest() -> None:
    goal, spec, kind = weight(), spec_of("W4A16"), data_type("int")
    (found,) = solve([Problem(goal, spec)], curvature(torch.zeros(HIDDEN, HIDDEN), 0.01), cycles=2)
    near = kind.quantize(goal, spec, Params(found.weight.scale.float()))
    assert torch.equal(found.weight.codes, near.codes)


@pytest.mark.parametrize("name", ["W2A16", "GGUF:Q2_K_S"])
def test_fewer_tokens_than_channels_are_enough(name) -> None:
    x = correlated(1, 20, HIDDEN).reshape(-1, HIDDEN)
    gram = x.t() @ x / 20
    assert torch.linalg.matrix_rank(gram) <= 20
    (found,) = solve([Problem(weight(), spec_of(name))], curvature(gram, 0.05), cycles=3)
    assert found.error < 0.3 * found.searched
    assert torch.isfinite(found.weight.dequantize()).all()


def test_damping_grows_until_the_matrix_can_be_factorized() -> None:
    gram = second_moment(32)
    gram -= 0.05 * gram.diagonal().mean() * torch.eye(32)  # a few negative eigenvalues
    assert torch.linalg.eigvalsh(gram).min() < 0
    assert curvature(gram, 0.01).damping > 0.01
    with pytest.raises(TunerError, match="no Cholesky factor even with"):
        curvature(torch.full((8, 8), float("nan")), 0.01)


def test_the_factor_is_that_of_the_inverse_in_falling_order() -> None:
    gram = second_moment(48)
    h = curvature(gram, 0.01)
    energy = gram.diagonal()[h.order]
    assert (energy.diff() <= 0).all()
    damped = h.ordered + 0.01 * gram.diagonal().mean() * torch.eye(48)
    torch.testing.assert_close(
        (h.upper.t() @ h.upper).double(), torch.linalg.inv(damped.double()), rtol=1e-3, atol=1e-4
    )


# --- blocks ----------------------------------------------------------------------------------


def test_layers_are_grouped_by_their_input_in_the_order_of_calls() -> None:
    names = [[t.ref.layer for t in group] for group in layer_groups(task())]
    assert names == [["b.q", "b.k"], ["b.o"], ["b.up"], ["b.down"]]


def test_a_layer_that_is_never_called_comes_last_and_is_rounded() -> None:
    made = task(layers=("up", "down"))
    made.block.spare = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(requires_grad=False)
    spare = Target(WeightRef("b.spare", "spare.weight", transposed=False), made.targets[0].scheme)
    made = dataclasses.replace(made, targets=(spare, *made.targets))
    assert [g[0].ref.layer for g in layer_groups(made)] == ["b.up", "b.down", "b.spare"]
    weights = SecondOrder().quantize(made).weights
    assert equal(weights["b.spare"], Rtn().quantize(made).weights["b.spare"])


def inputs_of(made: BlockTask) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the block's tokens in the quantized and in the float model, [T, WIDTH]."""
    return tuple(
        torch.cat([c.args[0].reshape(-1, WIDTH) for c in bank.calls])
        for bank in (made.inputs, made.float_inputs)
    )


@pytest.mark.parametrize("chunks", [1, 4, 16])
def test_moments_are_means_over_all_tokens_of_both_models(chunks) -> None:
    made = task(noise=0.3)
    settings = dataclasses.replace(made.settings, batch_size=16 // chunks)
    made = dataclasses.replace(made, settings=settings)
    x, x0 = inputs_of(made)
    seen = collect(made, made.targets[0], {}, gap=Gap.INPUT)
    assert seen is not None
    assert seen.whole.tokens == len(x)
    assert (seen.held is not None) == (chunks >= 8)
    torch.testing.assert_close(seen.whole.gram, x.t() @ x / len(x), rtol=1e-4, atol=1e-5)
    gap = (x0 - x).t() @ x / len(x)
    torch.testing.assert_close(seen.whole.gap, gap, rtol=1e-4, atol=1e-5)


def test_the_gap_of_outputs_is_what_the_blocks_output_lacks() -> None:
    made = task(noise=0.3)
    down = next(t for t in made.targets if t.ref.layer == "b.down")
    seen = collect(made, down, {}, gap=Gap.OUTPUT)
    x, _ = inputs_of(made)
    lacks = torch.stack(made.reference).reshape(-1, WIDTH) - made.block(x.unflatten(0, (-1, 16)))[
        0
    ].reshape(-1, WIDTH)
    given = torch.cat([trace(made, down, r, weights={}).given for r in made.inputs.chunks(16, 4)])
    torch.testing.assert_close(seen.whole.gap, lacks.t() @ given / len(x), rtol=1e-3, atol=1e-5)


def test_a_layer_that_adds_into_the_blocks_output_is_told_by_trial() -> None:
    made = task()
    shares = {t.ref.layer: added_share(made, t) for t in made.targets}
    assert shares["b.down"] == pytest.approx(1, abs=1e-4)
    assert shares["b.o"] == pytest.approx(1, abs=0.3)
    assert shares["b.q"] == shares["b.k"] == shares["b.up"] == 0


class Normed(torch.nn.Module):
    """A block whose only layer is normalized before it is added, as in Gemma 2, 3 and GLM-4."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + torch.nn.functional.rms_norm(self.down(x), (WIDTH,), eps=1e-3),)


def test_a_layer_that_is_normalized_before_it_is_added_has_no_share() -> None:
    made = task(layers=("down",))
    block = Normed().requires_grad_(requires_grad=False)
    block.down.weight.mul_(0.1)
    normed = dataclasses.replace(made, block=block)
    assert added_share(normed, normed.targets[0]) == 0


def test_later_layers_see_what_quantized_ones_give() -> None:
    made = task("W2A16")
    down = next(t for t in made.targets if t.ref.layer == "b.down")
    rough = Rtn().quantize(made).weights["b.up"].dequantize()
    rows = list(range(4))
    plain, after = (trace(made, down, rows, weights=w).given for w in ({}, {"up.weight": rough}))
    x = made.inputs.calls[0].args[0]
    x = x + made.block.o(
        torch.softmax(made.block.q(x) @ made.block.k(x).transpose(-1, -2) / WIDTH**0.5, -1) @ x
    )
    hidden = torch.nn.functional.silu(x @ rough.t())
    torch.testing.assert_close(after, hidden.reshape(-1, 2 * WIDTH))
    assert not torch.equal(plain, after)


def drifted() -> tuple[torch.Tensor, torch.Tensor, Statistics]:
    """Return float inputs, drifted inputs and their statistics."""
    x0 = correlated(4, 256, 32).reshape(-1, 32)
    noise = 0.3 * correlated(4, 256, 32, seed=4).reshape(-1, 32)
    x = x0 + noise

    def moments(x0, x):
        return Moments(x.t() @ x / len(x), (x0 - x).t() @ x / len(x), len(x))

    return x0, x, Statistics(Gap.INPUT, *[moments(x0, x)] * 3)


def test_the_goal_makes_up_for_errors_of_earlier_layers() -> None:
    x0, x, seen = drifted()
    w = weight(8, 32)
    (still,) = goals([w], seen, Knobs(pull=0.0))
    (full,) = goals([w], seen, Knobs(ridge=0.0))
    assert torch.equal(still.weight, w)
    assert full.share == pytest.approx(1, abs=1e-3)
    least = torch.linalg.lstsq(x.double(), (x0 @ w.t()).double()).solution.t()
    torch.testing.assert_close(full.weight.double(), least, rtol=1e-2, atol=1e-3)


def test_a_move_that_does_not_help_held_out_rows_is_not_made() -> None:
    _, _, seen = drifted()
    assert seen.held is not None
    against = dataclasses.replace(seen, held=Moments(seen.held.gram, -seen.held.gap, 1))
    w = weight(8, 32)
    (goal,) = goals([w], against, Knobs())
    assert goal.share == 0
    assert torch.equal(goal.weight, w)
    half = dataclasses.replace(seen, held=Moments(seen.held.gram * 2, seen.held.gap, 1))
    assert goals([w], half, Knobs(ridge=0.0))[0].share == pytest.approx(0.5, abs=1e-3)


def test_what_is_lacking_is_divided_by_how_much_of_it_is_added() -> None:
    x = correlated(4, 64, 32).reshape(-1, 32)
    lacks = x @ weight(8, 32).t()
    moments = Moments(x.t() @ x / len(x), lacks.t() @ x / len(x), len(x))
    seen = Statistics(Gap.OUTPUT, moments, None, None)
    (goal,) = goals([torch.zeros(8, 32)], seen, Knobs(ridge=0.0), added=0.5)
    torch.testing.assert_close(goal.weight, 2 * weight(8, 32), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["W4A16", "W2A16", "MXFP4", "NVFP4"])
def test_the_blocks_error_falls(name) -> None:
    made = task(name, noise=0.02)
    result = SecondOrder().quantize(made)
    assert result.loss_after < 0.8 * result.loss_before
    assert set(result.weights) == {t.ref.layer for t in made.targets}


def test_equal_tasks_give_equal_bits_and_nothing_is_left_behind() -> None:
    made = task(noise=0.1)
    before = {k: v.clone() for k, v in made.block.state_dict().items()}
    state = torch.get_rng_state()
    one, two = (SecondOrder().quantize(made).weights for _ in range(2))
    assert all(equal(one[n], two[n]) for n in one)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in made.block.state_dict().items())
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in made.block.modules()]
    assert not any(h or p for h, p in hooks)


def test_progress_counts_layers_and_every_solution_can_be_observed() -> None:
    steps, seen = [], {}
    made = dataclasses.replace(task(), report=lambda *a: steps.append(a))
    SecondOrder(observe=lambda layer, s: seen.setdefault(layer, s)).quantize(made)
    assert [s[:2] for s in steps] == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert set(seen) == {t.ref.layer for t in made.targets}
    assert all(s.error <= s.searched <= s.plain for s in seen.values())


@pytest.mark.parametrize("name", ["W3A16", "NVFP4"])
def test_polish_lowers_the_error_of_any_weights(name) -> None:
    made = task(name)
    rough = Rtn().quantize(made).weights
    better = polish(made, rough)
    for target in made.targets[:2]:  # q and k: the same inputs before and after
        gram = collect(made, target, {}).whole.gram
        own = made.weight(target)
        layer = target.ref.layer
        assert j(own - better[layer].dequantize(), gram) < 0.8 * j(
            own - rough[layer].dequantize(), gram
        )


def test_starting_parameters_are_searched_with_the_inputs_energy() -> None:
    made = task("W2A16")
    found = starting_params(made)
    q = made.targets[0]
    gram = collect(made, q, {}).whole.gram
    wanted = start(Problem(made.weight(q), q.scheme.weight), curvature(gram, 0.05))[0]
    assert torch.equal(found["b.q"].scale, wanted.scale)
    assert set(found) == {t.ref.layer for t in made.targets}


def test_it_is_found_by_name() -> None:
    assert isinstance(algorithm("second_order"), SecondOrder)
