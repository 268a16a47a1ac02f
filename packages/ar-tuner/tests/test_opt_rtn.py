"""Rounding with searched scales, and the importance that the search is weighted with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ar_kernels import equal
from ar_schemes import scheme, schemes
from ar_tuner.activations import collect_ranges
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.algorithms.importance import filled, input_energy, metered
from ar_tuner.algorithms.opt_rtn import OptRtn, gains, searched_of
from ar_tuner.algorithms.rtn import Rtn
from ar_tuner.algorithms.signround import SignRound
from ar_tuner.parts import WeightRef
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call

WIDTH = 256
"""Of the layer: what a super group of GGUF's K types needs."""
CALIBRATED = [n for n, s in schemes().items() if s.weight is not None and not s.roles]


class Experts(nn.Module):
    """Two experts, of which the tokens all go to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, x):
        return x + self.experts[0](x)


def task(name: str, *, dead: int = 0, **settings) -> BlockTask:
    torch.manual_seed(0)
    block = Experts().requires_grad_(requires_grad=False)
    inputs = [torch.randn(2, 8, WIDTH) * torch.linspace(0.05, 2, WIDTH) for _ in range(2)]
    for x in inputs:
        x[..., :dead] = 0
    targets = tuple(
        Target(WeightRef(f"b.experts.{i}", f"experts.{i}.weight", transposed=False), scheme(name))
        for i in range(2)
    )
    made = BlockTask(
        block=block,
        name="b",
        targets=targets,
        inputs=RowBank.of([Call(0, (x,), {}) for x in inputs], [2, 2]),
        reference=rows_of([block(x) for x in inputs]),
        settings=TuneSettings(**{"iters": 0, "batch_size": 2, **settings}),
        report=lambda *_: None,
    )
    return dataclasses.replace(made, ranges=collect_ranges(made))


def cost(made: BlockTask, weight, index: int = 0) -> float:
    """Squared error of a layer's weight, weighted by the mean square of its inputs."""
    x = torch.cat([c.args[0].reshape(-1, WIDTH) for c in made.inputs.calls])
    error = weight.dequantize() - made.weight(made.targets[index])
    return float((error.square() * x.square().mean(0)).sum())


@pytest.mark.parametrize("name", CALIBRATED)
def test_searched_scales_cost_no_more_in_any_scheme(name) -> None:
    made = task(name)
    plain, found = Rtn().quantize(made).weights, searched_of(made)
    if not gains(scheme(name)):
        assert not found
        return
    ours, theirs = cost(made, found["b.experts.0"]), cost(made, plain["b.experts.0"])
    assert ours <= theirs * 1.0001
    # integers with a power of two as scale have next to nothing to choose from
    assert ours < 0.995 * theirs or scheme(name).weight.bits == 8 or name == "MXINT4"
    result = OptRtn().quantize(made)
    assert result.loss_after <= result.loss_before


def test_only_plain_integers_of_eight_bits_gain_nothing() -> None:
    idle = {n for n in CALIBRATED if not gains(scheme(n))}
    assert idle == {"W8A16", "W8A16G64", "W8A16G32", "INT8", "INT8_W8A8", "GGUF:Q8_0"}
    assert not gains(scheme("BF16"))
    assert gains(scheme("W8A16").with_overrides({"act_bits": 4, "act_data_type": "int"}))


def test_wide_integers_are_searched_when_that_is_forced() -> None:
    forced = task("W8A16", search_wide=True)
    found = searched_of(forced)["b.experts.0"]
    assert cost(forced, found) < cost(forced, Rtn().quantize(forced).weights["b.experts.0"])


def test_energy_that_the_walk_measured_is_used_as_it_is() -> None:
    made = task("W4A16")
    with metered(made.block, made.targets) as energy:
        for call in made.inputs.calls:
            made.block(call.args[0])
    given = dataclasses.replace(made, energy=energy.means())
    one, two = searched_of(made), searched_of(given)
    assert all(equal(one[n], two[n]) for n in one)
    odd = {"b.experts.0": torch.linspace(2, 0.05, WIDTH).square()}
    other = searched_of(dataclasses.replace(made, energy=odd))
    assert not equal(other["b.experts.0"], one["b.experts.0"])


def test_an_expert_that_no_token_reached_is_searched_by_its_own_size_and_named() -> None:
    said: list[str] = []
    made = dataclasses.replace(task("W2A16"), note=said.append)
    assert set(input_energy(made)) == {"b.experts.0"}
    found, plain = searched_of(made)["b.experts.1"], Rtn().quantize(made).weights["b.experts.1"]
    weight = made.weight(made.targets[1])
    size = weight.abs()

    def error(q) -> float:
        return float(((q.dequantize() - weight).square() * size).sum())

    assert error(found) < error(plain)
    assert len(said) == 1
    assert "no calibration token reached 1 layers (b.experts.1" in said[0]


def test_importance_without_zeros_stays_as_it_is() -> None:
    energy = torch.linspace(1, 2, WIDTH)
    assert filled(energy, torch.randn(4, WIDTH), scheme("W4A16").weight) is energy


@pytest.mark.parametrize(("name", "bits"), [("W3A16G32", 3), ("W4A16G32", 4)])
def test_zeros_are_filled_group_by_group(name, bits) -> None:
    spec, weight = scheme(name).weight, torch.randn(3, 64)
    energy = torch.linspace(1, 2, 64)
    energy[:16] = 0  # just half of the first group of 32
    energy[32:49] = 0  # more than half of the second
    made = filled(energy, weight, spec)
    assert made.shape == (3, 64)
    for row in range(3):
        mean = energy[16:32].sum() / 16
        torch.testing.assert_close(made[row, :16], mean.expand(16))
        torch.testing.assert_close(made[row, 16:32], energy[16:32])
        size = weight[row, 32:].abs()
        size = size if bits <= 3 else size + (size.square().sum() / 32).sqrt()
        torch.testing.assert_close(made[row, 32:], size)


@pytest.mark.parametrize("name", ["W2A16", "W4A16G32", "GGUF:Q4_K_S", "GGUF:Q3_K_S", "NVFP4"])
def test_dead_channels_do_not_spoil_the_search(name) -> None:
    made = task(name, dead=200)
    plain, found = Rtn().quantize(made).weights, searched_of(made)
    assert cost(made, found["b.experts.0"]) <= cost(made, plain["b.experts.0"])


@pytest.mark.parametrize("name", ["GGUF:Q2_K_S", "GGUF:Q3_K_S"])
def test_frozen_scales_of_two_levels_stay_as_searched_while_codes_are_tuned(name) -> None:
    made = task(name, iters=20, frozen_super_scales=True, batch_size=4)
    found = searched_of(made)["b.experts.0"]
    tuned = SignRound().quantize(made).weights["b.experts.0"]
    free = SignRound().quantize(task(name, iters=20, batch_size=4)).weights["b.experts.0"]
    assert torch.equal(tuned.scale, found.scale)
    assert all(torch.equal(tuned.extra[k], found.extra[k]) for k in found.extra)
    assert not torch.equal(tuned.codes, found.codes)
    assert not torch.equal(free.scale, found.scale)


def test_scales_of_one_level_are_tuned_all_the_same() -> None:
    made = task("W4A16", iters=20, frozen_super_scales=True, batch_size=4)
    tuned = SignRound().quantize(made).weights["b.experts.0"]
    assert not torch.equal(tuned.scale, searched_of(made)["b.experts.0"].scale)
