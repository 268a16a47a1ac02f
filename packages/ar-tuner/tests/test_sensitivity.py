"""Weights of tokens by what the model's predictions depend on."""

from __future__ import annotations

import pytest
import torch

from ar_schemes import scheme
from ar_tuner import AutoRound, TunerError
from ar_tuner.adapters import GenericAdapter
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.algorithms.rtn import Rtn
from ar_tuner.algorithms.second_order.statistics import collect
from ar_tuner.blocks import Block, Discovery, WeightRef, find_blocks
from ar_tuner.devices import Placement
from ar_tuner.logits import drawn_loss
from ar_tuner.residence import Kept
from ar_tuner.rows import RowBank
from ar_tuner.sensitivity import CLIPPED, balanced, token_weights
from ar_tuner.walk import Call

QUICK = {"nsamples": 8, "seqlen": 32, "batch_size": 4, "bits": 2, "group_size": 32}


class Walk:
    """What `token_weights` looks at of a job."""

    def __init__(self, made, rows: torch.Tensor) -> None:
        self.model, self.rows = made, rows
        self.adapter = GenericAdapter()
        self.discovery: Discovery = find_blocks(made, self.adapter)
        self.settings = TuneSettings(batch_size=4, seed=7)
        nowhere = Placement(None, (None,) * len(self.discovery.blocks))
        self.residence = Kept(made, self.discovery.blocks, nowhere)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.discovery.blocks


def slow(made, rows: torch.Tensor, seed: int, batch: int) -> list[torch.Tensor]:
    """Return squared gradients at the output of each block, from one graph of the whole model."""
    parts: list[list[torch.Tensor]] = [[] for _ in made.model.layers]
    for number, some in enumerate(rows.split(batch)):
        kept: list[torch.Tensor] = []

        def keep(module, args, output, kept=kept):
            state = output[0] if isinstance(output, tuple) else output
            state = state if state.requires_grad else state.detach().requires_grad_()
            state.retain_grad()
            kept.append(state)
            return (state, *output[1:]) if isinstance(output, tuple) else state

        handles = [layer.register_forward_hook(keep) for layer in made.model.layers]
        with torch.enable_grad():
            logits = made(input_ids=some, use_cache=False).logits
            drawn_loss(logits, seed=seed * 1_000_003 + number).backward()
        for part, state in zip(parts, kept, strict=True):
            part.append(state.grad.square().sum(-1))
        for handle in handles:
            handle.remove()
    return [torch.cat(part) for part in parts]


def test_weights_are_the_squared_gradients_at_each_blocks_output(model, rows) -> None:
    made = model()
    found = token_weights(Walk(made, rows))
    assert [w.shape for w in found] == [rows.shape] * 2
    for mine, theirs in zip(found, slow(made, rows, 7, 4), strict=True):
        assert torch.allclose(mine, balanced(theirs), rtol=1e-3)
    assert not torch.allclose(found[0], found[1])
    assert all(p.grad is None for p in made.parameters())


def test_weights_have_a_mean_of_one_and_no_outliers() -> None:
    squares = torch.rand(10, 200, generator=torch.Generator().manual_seed(0))
    squares[3, 7] = 1e6
    found = balanced(squares)
    assert float(found.mean()) == pytest.approx(1.0, rel=1e-5)
    assert float(found[3, 7]) == float(found.max()) < 3.0
    share = (found == found.max()).double().mean()
    assert share <= 1 - CLIPPED + 2 / found.numel()


def test_what_no_prediction_depends_on_counts_like_everything_else() -> None:
    assert torch.equal(balanced(torch.zeros(2, 3)), torch.ones(2, 3))
    assert torch.equal(balanced(torch.full((2, 3), torch.nan)), torch.ones(2, 3))


def linear_task(weights: tuple[torch.Tensor, ...] | None) -> tuple[BlockTask, torch.Tensor]:
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)).requires_grad_(
        requires_grad=False
    )
    x = torch.randn(8, 5, 8)
    target = Target(WeightRef("b.0", "0.weight", transposed=False), scheme("W2A16"))
    task = BlockTask(
        block=block,
        name="b",
        targets=(target,),
        inputs=RowBank.of([Call(0, (x,), {})], [8]),
        reference=list(block(x)),
        settings=TuneSettings(batch_size=1),
        report=lambda *_: None,
        token_weights=weights,
    )
    return task, x


def test_moments_count_tokens_by_their_weight() -> None:
    weights = torch.rand(8, 5, generator=torch.Generator().manual_seed(1))
    task, x = linear_task(tuple(weights))
    seen = collect(task, task.targets[0], {})
    flat, w = x.reshape(-1, 8), weights.reshape(-1, 1)
    assert torch.allclose(seen.whole.gram, (flat * w).t() @ flat / w.sum(), rtol=1e-4, atol=1e-6)


def test_equal_weights_change_nothing() -> None:
    plain, _ = linear_task(None)
    equal, _ = linear_task(tuple(torch.ones(8, 5)))
    mine, theirs = (collect(t, t.targets[0], {}).whole.gram for t in (plain, equal))
    assert torch.allclose(mine, theirs, rtol=1e-6)


def test_weights_of_other_tokens_than_a_layer_is_given_are_left_out() -> None:
    task, x = linear_task(tuple(torch.rand(8, 3)))
    flat = x.reshape(-1, 8)
    found = collect(task, task.targets[0], {}).whole.gram
    assert torch.allclose(found, flat.t() @ flat / len(flat), rtol=1e-4, atol=1e-6)


def test_a_run_counts_tokens_and_gives_other_codes(model, rows) -> None:
    made = []
    for on in (False, True, True):
        quantized, _ = AutoRound(
            model(), dataset=rows, recipe="fast", iters=2, token_weights=on, **QUICK
        ).quantize()
        made.append(quantized.state_dict())
    key = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(made[0][key], made[1][key])
    assert torch.equal(made[1][key], made[2][key])


def test_weights_reach_the_task_of_each_block(model, rows, monkeypatch) -> None:
    seen = []

    class Look:
        name, needs_inputs = "look", True

        def quantize(self, task):
            seen.append(task.token_weights)
            return Rtn().quantize(task)

    monkeypatch.setattr("ar_tuner.api.algorithm", lambda name: Look())
    AutoRound(model(), dataset=rows, recipe="fast", token_weights=True, **QUICK).quantize()
    assert [len(w) for w in seen] == [8, 8]
    assert all(row.shape == (32,) for w in seen for row in w)


def test_only_second_order_has_a_use_for_them(model) -> None:
    with pytest.raises(TunerError, match="token_weights belong to algorithm 'second_order'"):
        AutoRound(model(), algorithm="signround", token_weights=True)
    with pytest.raises(TunerError, match="token_weights"):
        AutoRound(model(), recipe="rtn", token_weights=True)
