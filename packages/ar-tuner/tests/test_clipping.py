"""Static ranges of activations: searched, shared, and kept through a run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ar_kernels.numerics.activation import fake_quant_activation
from ar_schemes import scheme
from ar_tuner import AutoRound, TunerError
from ar_tuner.activations import collect_ranges
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.clipping import FACTORS
from ar_tuner.parts import WeightRef
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call

INT8 = scheme("INT8").with_overrides({"act_dynamic": False, "act_group_size": 0})
WIDTH = 64


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def task(wanted=INT8, *, clip: bool | None = True, outlier: float = 12.0) -> BlockTask:
    """Return a block whose inputs have one value that is far from all others."""
    torch.manual_seed(0)
    block = Gated().requires_grad_(requires_grad=False)
    x = torch.randn(4, 256, WIDTH)
    x[1, 2, 3] = outlier
    return BlockTask(
        block=block,
        name="b",
        targets=tuple(
            Target(WeightRef(f"b.{n}", f"{n}.weight", transposed=False), wanted)
            for n in ("gate_proj", "up_proj", "down_proj")
        ),
        inputs=RowBank.of([Call(0, (x,), {})], [4]),
        reference=rows_of([block(x)]),
        settings=TuneSettings(batch_size=2, clip_activations=clip),
        report=lambda *_: None,
    )


def given(made: BlockTask) -> torch.Tensor:
    return made.inputs.calls[0].args[0].reshape(-1, WIDTH)


def output_error(made: BlockTask, scale: torch.Tensor) -> float:
    """Return the squared error of what gate and up give by rounding their inputs, the slow way."""
    x, spec = given(made), INT8.activation
    error = fake_quant_activation(x, spec, static=scale) - x
    weights = torch.cat([made.block.gate_proj.weight, made.block.up_proj.weight])
    return float((error @ weights.t()).square().sum())


def test_a_range_is_searched_where_one_value_makes_all_steps_coarse() -> None:
    plain, clipped = (collect_ranges(task(clip=c)) for c in (False, True))
    made = task()
    name = "b.gate_proj"
    assert clipped[name] <= 0.85 * plain[name]
    assert output_error(made, clipped[name]) < 0.9 * output_error(made, plain[name])


def test_the_chosen_factor_is_the_best_of_all_by_the_weighted_error() -> None:
    made, spec = task(), INT8.activation
    x = given(made)
    weights = torch.cat([made.block.gate_proj.weight, made.block.up_proj.weight])
    top = x.abs().amax() / 127
    errors = [
        float(
            (
                (fake_quant_activation(x, spec, static=(top * f).reshape(1)) - x).square().sum(0)
                * weights.square().sum(0)
            ).sum()
        )
        for f in FACTORS
    ]
    best = FACTORS[errors.index(min(errors))]
    assert 0.5 < best < 1
    ranges = collect_ranges(made)
    torch.testing.assert_close(ranges["b.gate_proj"], (top * best).reshape(1))
    assert torch.equal(ranges["b.gate_proj"], ranges["b.up_proj"])


def test_an_outlier_that_weighs_much_is_not_clipped() -> None:
    made = task()
    with torch.no_grad():
        made.block.gate_proj.weight[:, 3] *= 100
    plain = collect_ranges(dataclasses.replace(made, settings=TuneSettings(batch_size=2)))
    assert torch.equal(collect_ranges(made)["b.gate_proj"], plain["b.gate_proj"])


def test_floats_have_no_coarse_steps_and_keep_their_range() -> None:
    wanted = scheme("FP8_STATIC")
    plain, clipped = (collect_ranges(task(wanted, clip=c)) for c in (False, True))
    assert clipped["b.gate_proj"] > 0.9 * plain["b.gate_proj"]


def test_left_open_ranges_of_integers_are_searched_and_those_of_floats_are_not() -> None:
    for wanted, searched in ((INT8, True), (scheme("FP8_STATIC"), False)):
        by = {c: collect_ranges(task(wanted, clip=c))["b.gate_proj"] for c in (None, True, False)}
        assert torch.equal(by[None], by[searched])
    integers = {c: collect_ranges(task(clip=c))["b.gate_proj"] for c in (None, False)}
    assert integers[None] < integers[False]


def test_equal_tasks_give_equal_ranges_and_leave_nothing_behind() -> None:
    made = task()
    one, two = collect_ranges(made), collect_ranges(made)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.block.modules())


def test_searched_ranges_reach_the_checkpoint(model, rows, sinks, tmp_path) -> None:
    found = []
    for on in (False, True):
        job = AutoRound(
            model(),
            scheme=INT8,
            dataset=rows,
            recipe="rtn",
            nsamples=8,
            seqlen=32,
            clip_activations=on,
        )
        job.quantize_and_save(tmp_path / f"out{on}", format="memory")
        found.append({k: float(w.extra["input_scale"]) for k, w in sinks[-1].weights.items()})
    plain, clipped = found
    assert all(clipped[k] <= plain[k] * 1.001 for k in plain)
    assert any(clipped[k] < 0.97 * plain[k] for k in plain)


def test_anything_but_a_switch_is_refused(model) -> None:
    with pytest.raises(TunerError, match="clip_activations 'yes' is not allowed"):
        AutoRound(model(), clip_activations="yes")
