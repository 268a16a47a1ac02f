from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ar_kernels import equal
from ar_schemes import scheme
from ar_tuner import TunerError
from ar_tuner.algorithms.base import Algorithm, BlockTask, Target, TuneSettings
from ar_tuner.algorithms.importance import input_energy
from ar_tuner.algorithms.rtn import Rtn
from ar_tuner.algorithms.signround import SignRound, block_error, generator_for
from ar_tuner.parts import WeightRef
from ar_tuner.registry import algorithm, algorithms
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32, bias=True)

    def forward(self, x):
        return (x + self.down(torch.nn.functional.silu(self.up(x))),)


def task(name: str = "W3A16", *, sym: bool = True, **settings) -> BlockTask:
    torch.manual_seed(3)
    block = Mlp().requires_grad_(requires_grad=False)
    mixing = torch.randn(32, 32) * torch.linspace(0.1, 2, 32)
    inputs = [torch.randn(4, 8, 32) @ mixing for _ in range(4)]
    chosen = scheme(name).with_overrides({"group_size": 32, "sym": sym})
    targets = tuple(
        Target(WeightRef(f"b.{n}", f"{n}.weight", transposed=False), chosen) for n in ("up", "down")
    )
    calls = [Call(0, (x,), {}) for x in inputs]
    numbers = {"iters": 40, "batch_size": 4, **settings}
    return BlockTask(
        block=block,
        name="b",
        targets=targets,
        inputs=RowBank.of(calls, [4] * 4),
        reference=rows_of([block(x)[0] for x in inputs]),
        settings=TuneSettings(**numbers),
        report=lambda *_: None,
    )


@pytest.mark.parametrize("name", ["W2A16", "W3A16", "W4A16"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("init", ["search", "minmax"])
def test_tuning_beats_rounding_to_nearest(name, sym, init) -> None:
    made = task(name, sym=sym, scale_init=init, iters=200)
    result = SignRound().quantize(made)
    assert result.loss_after < 0.9 * result.loss_before
    assert result.loss_after == pytest.approx(block_error(made, result.weights))


@pytest.mark.parametrize("keep", ["last", "best"])
def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(keep) -> None:
    one, two = (SignRound().quantize(task(keep=keep)).weights for _ in range(2))
    assert all(equal(one[n], two[n]) for n in one)
    other = SignRound().quantize(task(keep=keep, seed=1)).weights
    assert not all(equal(one[n], other[n]) for n in one)


def test_neither_the_block_nor_the_global_random_state_changes() -> None:
    made = task()
    before = {k: v.clone() for k, v in made.block.state_dict().items()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    SignRound().quantize(made)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in made.block.state_dict().items())
    assert all(p.grad is None for p in made.block.parameters())
    assert not made.block.up._forward_pre_hooks


def test_a_weight_that_is_on_the_grid_is_found_exactly() -> None:
    made = task("W4A16")
    grid = Rtn().quantize(made).weights
    with torch.no_grad():
        made.block.up.weight.copy_(grid["b.up"].dequantize())
        made.block.down.weight.copy_(grid["b.down"].dequantize())
    reference = rows_of([made.block(c.args[0])[0] for c in made.inputs.calls])
    result = SignRound().quantize(dataclasses.replace(made, reference=reference))
    assert result.loss_after < 1e-4


def test_no_steps_mean_rounding_to_nearest() -> None:
    made = task(iters=0)
    nearest = Rtn().quantize(made).weights
    result = SignRound().quantize(made)
    assert all(equal(result.weights[n], nearest[n]) for n in nearest)
    assert result.loss_before == result.loss_after


def test_scale_factors_stay_when_they_are_not_tuned() -> None:
    made = task(minmax_tuning=False, scale_init="minmax")
    nearest, tuned = Rtn().quantize(made).weights, SignRound().quantize(made).weights
    assert all(torch.equal(nearest[n].scale, tuned[n].scale) for n in nearest)


def test_signround_as_published_beats_rounding_to_nearest() -> None:
    made = task("W4A16", scale_init="minmax", keep="best", iters=200)
    result = SignRound().quantize(made)
    assert result.loss_after < 0.9 * result.loss_before


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.5},
        {"optimizer": "adam"},
        {"lr_scheduler": "cosine"},
        {"lr_scheduler": "constant"},
        {"accumulate": 2},
        {"loss": "suppressed"},
        {"keep": "best", "validation_rows": 4},
        {"keep": "best", "patience": 5},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_variant_of_the_loop_tunes_in_its_own_way_and_repeats_itself(settings) -> None:
    plain = SignRound().quantize(task())
    one, two = (SignRound().quantize(task(**settings)) for _ in range(2))
    assert one.loss_after < 0.95 * one.loss_before
    assert all(equal(one.weights[n], two.weights[n]) for n in one.weights)
    assert not all(equal(one.weights[n], plain.weights[n]) for n in plain.weights)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("name", ["W2A16", "W4A16"])
def test_the_extended_algorithm_beats_the_published_one(name, sym) -> None:
    published = task(name, sym=sym, scale_init="minmax", keep="best")
    extended = task(name, sym=sym, loss="suppressed")
    before = SignRound().quantize(published).loss_after
    assert SignRound().quantize(extended).loss_after < before


def test_steps_that_lead_to_no_number_are_thrown_away() -> None:
    made = task(optimizer="adam", iters=2)
    broken = [r * float("nan") for r in made.reference]
    result = SignRound().quantize(dataclasses.replace(made, reference=broken))
    nearest = Rtn().quantize(made).weights
    assert result.diverged
    assert all(equal(result.weights[n], nearest[n]) for n in nearest)


def test_long_runs_take_larger_steps_at_two_and_three_bits_only() -> None:
    assert TuneSettings(iters=1000).offset_step(2) == 2 / 1000
    assert TuneSettings(iters=1000).minmax_step(4) == 1 / 1000
    assert TuneSettings(iters=1000, lr=0.01).offset_step(2) == 0.01
    assert TuneSettings(iters=10, minmax_lr=0.02).minmax_step(2) == 0.02


def test_progress_is_reported_with_the_loss() -> None:
    seen = []
    SignRound().quantize(dataclasses.replace(task(), report=lambda *a: seen.append(a)))
    assert seen[-1][:2] == (40, 40)
    assert len(seen) == 10


def test_input_energy_is_the_mean_square_of_each_channel() -> None:
    made = task()
    x = torch.cat([c.args[0].reshape(-1, 32) for c in made.inputs.calls])
    torch.testing.assert_close(input_energy(made)["b.up"], x.square().mean(0))


def test_a_blocks_random_stream_is_its_own() -> None:
    settings = TuneSettings()
    streams = [generator_for(settings, n).initial_seed() for n in ("a", "b", "a")]
    assert streams[0] == streams[2] != streams[1]


def test_algorithms_are_found_by_name() -> None:
    assert set(algorithms()) >= {"signround", "opt_rtn", "rtn"}
    assert isinstance(algorithm("signround"), Algorithm)
    with pytest.raises(TunerError, match="unknown algorithm 'singround'. Did you mean signround"):
        algorithm("singround")
