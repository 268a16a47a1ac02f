"""Blocks that lose far more than their neighbours get a second try."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ar_kernels import equal
from ar_schemes import scheme
from ar_tuner import AutoRound, events
from ar_tuner.algorithms.base import BlockResult, BlockTask, Target, TuneSettings
from ar_tuner.algorithms.rtn import Rtn
from ar_tuner.algorithms.signround import SignRound
from ar_tuner.guard import doubt, guarded, power, relative_error
from ar_tuner.parts import WeightRef
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call

USUAL = [0.01, 0.012, 0.011]


class Failing:
    """Tunes well with small steps only: with larger ones all weights become zero."""

    name = "failing"
    needs_inputs = True

    def __init__(self, limit: float, where: str = "") -> None:
        self.limit, self.where = limit, where
        self.calls: list[tuple[str, float]] = []

    def quantize(self, task: BlockTask) -> BlockResult:
        step = task.settings.offset_step(4)
        self.calls.append((task.name, step))
        made = SignRound().quantize(task)
        if self.where not in task.name or step < self.limit:
            return made
        spoiled = {n: dataclasses.replace(w, scale=w.scale * 0) for n, w in made.weights.items()}
        return BlockResult(spoiled, made.loss_before, 50.0)


def task(**settings) -> BlockTask:
    torch.manual_seed(0)
    block = nn.Linear(64, 64, bias=False).requires_grad_(requires_grad=False)
    inputs = torch.randn(4, 8, 64)
    chosen = scheme("W4A16").with_overrides({"group_size": 32})
    return BlockTask(
        block=block,
        name="b",
        targets=(Target(WeightRef("b.x", "weight", transposed=False), chosen),),
        inputs=RowBank.of([Call(0, (inputs,), {})], [4]),
        reference=rows_of([block(inputs)]),
        settings=TuneSettings(**{"iters": 8, "batch_size": 4, **settings}),
        report=lambda *_: None,
    )


def test_an_error_is_doubtful_beside_its_neighbours_or_when_it_is_no_number() -> None:
    assert doubt(0.033, USUAL) is None
    assert "0.034 is more than 3 times its neighbours' 0.011" in doubt(0.034, USUAL)
    assert "not finite" in doubt(float("nan"), [])
    assert doubt(9.0, [0.01]) is None, "one neighbour is no neighbourhood"
    assert doubt(0.1, [9.0, 9.0, 0.01, 0.01, 0.01, 0.01]) is not None, "the nearest four count"
    assert doubt(0.1, [float("inf"), 0.01, 0.01]) is not None


def test_errors_are_relative_to_the_reference() -> None:
    made = task()
    scale = power(made.reference)
    assert scale == pytest.approx(float(torch.stack(list(made.reference)).square().mean()))
    assert relative_error(BlockResult({}, 1.0, 0.5), 2.0) == 0.25
    assert relative_error(BlockResult({}, 1.0, 0.5), 0.0) == 0.5
    assert relative_error(BlockResult({}), 2.0) is None


def test_a_block_that_does_well_is_left_alone() -> None:
    made, said = task(), []
    result = guarded(SignRound(), made, [1.0, 1.0], lambda *note: said.append(note))
    plain = SignRound().quantize(made)
    assert equal(result.weights["b.x"], plain.weights["b.x"])
    assert result.relative == pytest.approx(plain.loss_after / power(made.reference))
    assert said == []


def test_a_failing_block_is_tuned_again_with_smaller_steps_and_reported() -> None:
    failing, said = Failing(limit=0.1), []
    result = guarded(failing, task(), USUAL, lambda *note: said.append(note))
    assert [step for _, step in failing.calls] == [1 / 8, 1 / 32]
    assert result.loss_after < result.loss_before
    assert [level for level, _ in said] == ["warning"]
    assert said[0][1].startswith("b: its relative error")
    assert "tuning with smaller steps gives" in said[0][1]


def test_no_block_loses_more_than_rounding_to_nearest() -> None:
    notes: list[tuple[str, str]] = []
    limit = Failing(limit=0.0).quantize(task()).loss_before

    class Poor:
        name, needs_inputs = "poor", True

        def quantize(self, task: BlockTask) -> BlockResult:
            made = Failing(limit=0.0).quantize(task)
            return dataclasses.replace(made, loss_after=2 * made.loss_before)

    found = guarded(Poor(), task(), [], lambda level, text: notes.append((level, text)))
    assert found.loss_after <= limit
    assert "rounding to nearest" in notes[0][1]


def test_searched_scales_are_kept_where_no_tuning_helps() -> None:
    said = []
    result = guarded(Failing(limit=0.0), task(), USUAL, lambda *note: said.append(note))
    assert result.loss_after < result.loss_before
    assert "rounding to nearest with searched scales gives" in said[0][1]


def test_a_block_that_nothing_helps_keeps_its_first_result_and_says_so() -> None:
    made, said = task(), []

    class Steady(Failing):
        def quantize(self, task: BlockTask) -> BlockResult:
            return dataclasses.replace(SignRound().quantize(made), loss_after=1e-7)

    result = guarded(Steady(9.0), made, [1e-12, 1e-12], lambda *note: said.append(note))
    assert equal(result.weights["b.x"], SignRound().quantize(made).weights["b.x"])
    assert "no other try gave less" in said[0][1]
    assert "layer_config" in said[0][1]


def test_results_that_are_no_numbers_are_tried_again() -> None:
    made, said = task(), []

    class Lost(Failing):
        def quantize(self, task: BlockTask) -> BlockResult:
            return dataclasses.replace(super().quantize(task), loss_after=float("nan"))

    result = guarded(Lost(limit=9.0), made, [], lambda *note: said.append(note))
    assert result.loss_after < result.loss_before
    assert "its error is not finite" in said[0][1]


def test_a_tuning_that_diverged_is_tried_again_though_its_fallback_is_fine() -> None:
    said = []

    class Diverged(Failing):
        def quantize(self, task: BlockTask) -> BlockResult:
            plain = Rtn().quantize(task).weights
            made = super().quantize(task)
            if task.settings.offset_step(4) < 0.1:
                return made
            return BlockResult(plain, made.loss_before, made.loss_before, diverged=True)

    result = guarded(Diverged(limit=9.0), task(), [], lambda *note: said.append(note))
    assert result.loss_after < result.loss_before
    assert "tuning left the finite numbers" in said[0][1]


def test_rounding_is_reported_but_not_repeated() -> None:
    from ar_tuner.algorithms.opt_rtn import OptRtn

    said = []
    guarded(OptRtn(), task(iters=0), [1e-9, 1e-9], lambda *note: said.append(note))
    assert "no other try gave less" in said[0][1]
    unseen = guarded(Rtn(), task(), USUAL, lambda *note: said.append(note))
    assert unseen.loss_after is None
    assert len(said) == 1


def test_a_block_made_to_fail_is_mended_in_a_run(model, rows, monkeypatch) -> None:
    failing = Failing(limit=0.2, where="layers.3")
    monkeypatch.setattr("ar_tuner.api.algorithm", lambda _: failing)
    seen: list[events.Event] = []
    numbers = {"iters": 4, "nsamples": 8, "seqlen": 32, "batch_size": 4, "group_size": 32}
    numbers["distill"] = False
    made = model("llama", num_hidden_layers=4)
    AutoRound(made, dataset=rows, on_event=seen.append, **numbers).quantize()
    notes = [e for e in seen if isinstance(e, events.Note)]
    assert [n.level for n in notes] == ["warning"]
    assert notes[0].text.startswith("model.layers.3: its relative error")
    done = [e for e in seen if isinstance(e, events.BlockDone)]
    assert done[3].loss_after <= done[3].loss_before
    assert [name for name, _ in failing.calls].count("model.layers.3") == 2
