"""Codes and scales of finished blocks that move on the block's own error."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ar_kernels import equal
from ar_schemes import scheme
from ar_tuner import AutoRound, TunerError
from ar_tuner.algorithms import block_tuning
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.algorithms.block_tuning import Tuned, tuned
from ar_tuner.algorithms.opt_rtn import OptRtn
from ar_tuner.algorithms.rtn import Rtn
from ar_tuner.blocks import WeightRef
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call

QUICK = {"nsamples": 8, "seqlen": 32, "batch_size": 4, "bits": 2, "group_size": 32}
WIDTH = 32


class Block(torch.nn.Module):
    """Two layers with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


@pytest.fixture(autouse=True)
def _long_steps(monkeypatch) -> None:
    """Steps of the usual length leave no code's margin in as few as there are here."""
    monkeypatch.setattr(block_tuning, "CODES", 2e-2)


def task(name: str = "W2A16", *, rows: int = 32, **changes) -> BlockTask:
    torch.manual_seed(0)
    block = Block().requires_grad_(requires_grad=False)
    mixing = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    x = torch.randn(rows, 16, WIDTH) @ mixing
    chosen = scheme(name)
    if chosen.weight.data_type == "int":
        chosen = chosen.with_overrides({"group_size": 16})
    targets = tuple(
        Target(WeightRef(f"b.{n}", f"{n}.weight", transposed=False), chosen) for n in ("up", "down")
    )
    return BlockTask(
        block=block,
        name="b",
        targets=targets,
        inputs=RowBank.of([Call(0, (part,), {}) for part in x.split(4)], [4] * (rows // 4)),
        reference=rows_of([block(part) for part in x.split(4)]),
        settings=TuneSettings(batch_size=8),
        **{"report": lambda *_: None, **changes},
    )


@pytest.mark.parametrize("name", ["W2A16", "W4A16", "MXFP4", "NVFP4"])
def test_a_block_gains_on_rows_it_was_not_tuned_on(name) -> None:
    mine = task(name)
    start = OptRtn().quantize(mine)
    found = tuned(mine, start, 60)
    assert found.loss_after < 0.97 * start.loss_after
    assert set(found.weights) == set(start.weights)
    assert any(
        not torch.equal(found.weights[k].codes, start.weights[k].codes) for k in found.weights
    )


def test_rows_held_out_decide(monkeypatch) -> None:
    mine = task()
    start = OptRtn().quantize(mine)
    monkeypatch.setattr(block_tuning, "CODES", 1.0)  # codes fly about
    assert tuned(mine, start, 8) is start


def test_rows_held_out_are_not_tuned_on(monkeypatch) -> None:
    mine = task()
    drawn: set[int] = set()
    judged: set[int] = set()
    step, error = block_tuning._step, block_tuning._error

    def note(task, fixed, latents, rows, share, number):
        drawn.update(rows)
        return step(task, fixed, latents, rows, share, number)

    def judge(task, weights, chunks):
        judged.update(r for rows in chunks for r in rows)
        return error(task, weights, chunks)

    monkeypatch.setattr(block_tuning, "_step", note)
    monkeypatch.setattr(block_tuning, "_error", judge)
    tuned(mine, OptRtn().quantize(mine), 12)
    assert judged == set(range(28, 32))
    assert drawn == set(range(28))


def test_equal_seeds_give_equal_bits() -> None:
    mine = task()
    start = OptRtn().quantize(mine)
    one, two = tuned(mine, start, 20), tuned(mine, start, 20)
    assert all(equal(one.weights[k], two.weights[k]) for k in one.weights)


def test_heavy_tokens_gain_most() -> None:
    weights = torch.full((32, 16), 0.05)
    weights[:, :2] = 8.0
    heavy = task(token_weights=tuple(weights))
    plain = dataclasses.replace(heavy, token_weights=None)
    start = OptRtn().quantize(plain)

    def left(result) -> float:
        stored = {
            f"{k.removeprefix('b.')}.weight": w.dequantize() for k, w in result.weights.items()
        }
        output, reference = plain.run(stored, list(range(32)))
        return float((output - reference)[:, :2].square().mean())

    assert left(tuned(heavy, start, 60)) < left(tuned(plain, start, 60))


def test_too_few_rows_change_nothing_and_say_so() -> None:
    said: list[str] = []
    mine = task(rows=4, note=said.append)
    start = Rtn().quantize(mine)
    assert tuned(mine, start, 4) is start
    assert "too few rows" in said[0]


def test_a_run_tunes_its_blocks_and_the_block_stays_as_it_was(model, rows) -> None:
    losses = []
    many = rows.repeat(4, 1)
    for steps in (0, 20):
        done = []
        job = AutoRound(
            model(),
            dataset=many,
            on_event=lambda e, done=done: done.append(e.to_dict()),
            algorithm="opt_rtn",
            iters=2,
            block_steps=steps,
            **{**QUICK, "nsamples": 32},
        )
        job.quantize()
        losses.append([e["loss_after"] for e in done if e["kind"] == "block_done"])
    assert losses[1][0] < losses[0][0]


def test_an_algorithm_keeps_its_name() -> None:
    assert Tuned(Rtn(), 3).name == "rtn"
    assert Tuned(Rtn(), 3).needs_inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [({"block_steps": -1}, "block_steps -1"), ({"block_steps": 4, "recipe": "rtn"}, "block_steps")],
)
def test_steps_that_cannot_be_are_refused(model, options, message) -> None:
    with pytest.raises(TunerError, match=message):
        AutoRound(model(), **options)
