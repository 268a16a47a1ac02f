from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ar_schemes import scheme
from ar_tuner.activations import (
    collect_ranges,
    is_static,
    quantized_activations,
    static_ranges,
    with_range,
)
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.algorithms.rtn import Rtn
from ar_tuner.algorithms.signround import SignRound, block_error
from ar_tuner.fused import fused_groups, shared_values
from ar_tuner.parts import WeightRef
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call

ACTIVATED = ["INT8", "INT4", "MXFP4", "MXFP8", "NVFP4", "FP8_STATIC", "FP8_BLOCK"]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(128, 128, bias=False)
        self.up_proj = nn.Linear(128, 128, bias=False)
        self.down_proj = nn.Linear(128, 128, bias=False)

    def forward(self, x):
        return x + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def task(name: str, **settings) -> BlockTask:
    torch.manual_seed(0)
    block = Pair().requires_grad_(requires_grad=False)
    inputs = [torch.randn(4, 8, 128) for _ in range(2)]
    targets = tuple(
        Target(WeightRef(f"b.{n}", f"{n}.weight", transposed=False), scheme(name))
        for n in ("gate_proj", "up_proj", "down_proj")
    )
    made = BlockTask(
        block=block,
        name="b",
        targets=targets,
        inputs=RowBank.of([Call(0, (x,), {}) for x in inputs], [4, 4]),
        reference=rows_of([block(x) for x in inputs]),
        settings=TuneSettings(**{"iters": 30, "batch_size": 4, **settings}),
        report=lambda *_: None,
    )
    made = dataclasses.replace(made, shared=shared_values(made))
    return dataclasses.replace(made, ranges=collect_ranges(made))


def test_only_schemes_with_a_collected_range_are_static() -> None:
    assert {n for n in ACTIVATED if is_static(scheme(n))} == {"NVFP4", "FP8_STATIC"}


@pytest.mark.parametrize("name", ACTIVATED)
def test_activations_are_quantized_within_the_context_only(name) -> None:
    made = task(name)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    plain = made.block(x)
    with quantized_activations(made.block, made.targets, made.ranges):
        inside = made.block(x)
    assert not torch.equal(plain, inside)
    assert torch.allclose(plain, inside, atol=1.0)
    assert torch.equal(plain, made.block(x))


@pytest.mark.parametrize("name", ACTIVATED)
def test_tuning_is_judged_with_quantized_activations_and_never_hurts(name) -> None:
    made = task(name, iters=60)
    result = SignRound().quantize(made)
    assert result.loss_after <= result.loss_before
    bare = dataclasses.replace(
        made,
        targets=tuple(
            dataclasses.replace(t, scheme=dataclasses.replace(t.scheme, activation=None))
            for t in made.targets
        ),
    )
    assert block_error(bare, result.weights) != block_error(made, result.weights)


def test_the_range_of_fp8_is_the_largest_input_over_448() -> None:
    made = task("FP8_STATIC")
    peak = max(float(c.args[0].abs().max()) for c in made.inputs.calls)
    for layer in ("b.gate_proj", "b.up_proj"):
        assert made.ranges[layer].shape == (1,)
        assert float(made.ranges[layer]) == pytest.approx(peak / 448, rel=1e-6)


def test_ranges_travel_in_the_weight() -> None:
    made = task("FP8_STATIC")
    weights = {
        t.ref.layer: with_range(
            Rtn().quantize(made).weights[t.ref.layer], t.scheme, made.ranges[t.ref.layer]
        )
        for t in made.targets
    }
    assert all("input_scale" in w.extra for w in weights.values())
    assert {k: float(v) for k, v in static_ranges(weights).items()} == {
        k: float(v) for k, v in made.ranges.items()
    }


def test_fused_layers_share_their_global_scale() -> None:
    made = task("NVFP4")
    with torch.no_grad():
        made.block.up_proj.weight.mul_(7)
    made = dataclasses.replace(made, shared=shared_values(made))
    weights = Rtn().quantize(made).weights
    gate, up, down = (
        weights[f"b.{n}"].extra["global_scale"] for n in ("gate_proj", "up_proj", "down_proj")
    )
    assert torch.equal(gate, up)
    assert not torch.equal(gate, down)


def test_fused_groups_are_siblings() -> None:
    names = ["a.q_proj", "a.k_proj", "b.q_proj", "a.v_proj", "a.o_proj", "m.w1", "m.w2", "m.w3"]
    assert fused_groups(names) == [
        ("a.q_proj", "a.k_proj", "a.v_proj"),
        ("b.q_proj",),
        ("a.o_proj",),
        ("m.w1", "m.w3"),
        ("m.w2",),
    ]


class Mixture(nn.Module):
    """Three experts with two layers each, of which the tokens go to the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(128, 128, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(128, 128, bias=False) for n in ("up_proj", "down_proj")})
            for _ in range(3)
        )

    def forward(self, x):
        x = self.attn(1000 * x) / 1000
        for factor, expert in zip((1.0, 3.0), self.experts, strict=False):
            x = x + expert["down_proj"](7 * expert["up_proj"](factor * x))
        return x


@pytest.mark.parametrize("name", ["FP8_STATIC", "NVFP4"])
def test_an_expert_without_tokens_gets_the_largest_range_of_its_siblings(name) -> None:
    torch.manual_seed(0)
    block, x = Mixture().requires_grad_(requires_grad=False), torch.randn(4, 8, 128)
    layers = ["attn", *(f"experts.{i}.{n}" for i in range(3) for n in ("up_proj", "down_proj"))]
    targets = tuple(
        Target(WeightRef(f"b.{n}", f"{n}.weight", transposed=False), scheme(name)) for n in layers
    )
    ranges = collect_ranges(
        BlockTask(
            block=block,
            name="b",
            targets=targets,
            inputs=RowBank.of([Call(0, (x,), {})], [4]),
            reference=rows_of([block(x)]),
            settings=TuneSettings(batch_size=4),
            report=lambda *_: None,
        )
    )
    assert set(ranges) == {f"b.{n}" for n in layers}
    choose = min if name == "NVFP4" else max  # a tensor scale is the inverse of the range
    for kind in ("up_proj", "down_proj"):
        first, second, unseen = (float(ranges[f"b.experts.{i}.{kind}"]) for i in range(3))
        assert first != second
        assert unseen == choose(first, second)
