"""Scales for the sake of activations that share powers of two."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from ar_kernels.numerics.halves import fake_quant_alike
from ar_schemes import scheme
from ar_tuner import AutoRound
from ar_tuner.algorithms.rtn import nearest_of
from ar_tuner.algorithms.signround import block_error
from ar_tuner.folding import apply, fold
from ar_tuner.folding.evening import Given, phased

MX = scheme("MXFP4")
QUICK = {"nsamples": 8, "seqlen": 32, "batch_size": 4, "scheme": "MXFP4"}


def given(x: torch.Tensor, weight: torch.Tensor) -> Given:
    assert MX.weight is not None
    assert MX.activation is not None
    return Given(x, (weight,), (MX.weight,), MX.activation)


def error(x: torch.Tensor, factor: torch.Tensor) -> float:
    made = fake_quant_alike((x / factor).contiguous(), MX.activation) * factor
    return float((made - x).square().sum())


def test_a_group_is_moved_to_where_its_largest_value_is_kept() -> None:
    """7.9 is clamped to 6, and its group rounded in steps of 1 and 2; 3.95 becomes 4."""
    x = torch.full((4, 64), 1.0)
    x[:, 0] = 7.9
    x[:, 32] = 4.0
    factor = phased(given(x, torch.ones(2, 64)), torch.ones(64))
    assert error(x, factor) < 0.2 * error(x, torch.ones(64))
    assert len(factor[:32].unique()) == len(factor[32:].unique()) == 1
    assert factor[32] == 1.0  # where nothing is lost nothing moves
    assert 0.5 < factor[0] < 1.0


@pytest.mark.parametrize(
    ("alike", "tied"),
    [
        (torch.arange(128), False),
        (torch.arange(64).repeat(2), True),  # a head of two groups that two heads share
        (torch.arange(128).roll(16) % 96, None),  # groups overlap: all of them tie
    ],
    ids=["own", "shared", "overlapping"],
)
def test_groups_that_follow_the_same_rows_have_one_factor(alike, tied) -> None:
    g = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 1.2, 1.4, 1.7]).repeat_interleave(32)
    x = torch.randn(2048, 128, generator=g) * scales
    factor = phased(given(x, torch.ones(2, 128)), torch.ones(128), alike)
    parts = factor.view(4, 32)[:, 0]
    if tied is None:
        assert len(parts.unique()) == 1
    elif tied:
        assert torch.equal(parts[:2], parts[2:])
        assert len(parts.unique()) > 1
    else:
        assert len(parts.unique()) > 2
    rows = torch.zeros(int(alike.max()) + 1)
    rows[alike] = factor
    assert torch.equal(rows[alike], factor)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_blocks_lose_less_and_stay_what_they_are(model, rows, uneven, task_of, kind) -> None:
    task = task_of(uneven(model(kind)), rows)
    targets = tuple(replace(t, scheme=MX) for t in task.targets)
    task = replace(task, targets=targets)
    floats = tuple(replace(t, scheme=replace(MX, activation=None)) for t in targets)
    bare = replace(task, targets=floats)
    before = block_error(task, nearest_of(task))
    plain = bare.run({}, [0, 1, 2])[0]
    folding = fold(task, weights=False)
    assert any("norm" in name for name in folding.tensors)
    assert folding.rows  # values behind attention, the up projection
    apply(task.block, task.targets, folding)
    assert (bare.run({}, [0, 1, 2])[0] - plain).square().sum() < 1e-6 * plain.square().sum()
    assert block_error(task, nearest_of(task)) < 0.95 * before


def test_layers_of_float_activations_are_left_alone_unless_asked_for(
    model, rows, uneven, task_of
) -> None:
    notes: list[str] = []
    task = replace(task_of(uneven(model("gpt_oss")), rows), note=notes.append)
    assert not fold(task, weights=False)
    assert not notes
    assert fold(task)


def test_layers_of_other_quantized_activations_are_left_alone(model, rows, uneven, task_of) -> None:
    task = task_of(uneven(model()), rows)
    other = scheme("INT8")
    task = replace(task, targets=tuple(replace(t, scheme=other) for t in task.targets))
    assert not fold(task)


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({"recipe": "fast", "iters": 2}, True),
        ({"recipe": "fast", "iters": 2, "fold": False}, False),
        ({"recipe": "fast", "iters": 2, "scheme": "W4A16", "group_size": 32}, False),
        ({"algorithm": "signround", "iters": 2}, False),
        ({"recipe": "opt_rtn"}, False),
        ({"recipe": "opt_rtn", "fold": True}, True),
    ],
    ids=lambda o: "-".join(map(str, o.values())) if isinstance(o, dict) else str(o),
)
def test_second_order_is_given_evened_blocks_and_the_checkpoint_is_the_model(
    model, rows, sinks, tmp_path, uneven, options, moves
) -> None:
    made = uneven(model())
    floats = copy.deepcopy(made.state_dict())
    AutoRound(made, dataset=rows, **{**QUICK, **options}).quantize_and_save(
        tmp_path / "out", format="memory"
    )
    sink = sinks[-1]
    moved = [k for k, v in sink.tensors.items() if "norm" in k and not torch.equal(v, floats[k])]
    assert bool(moved) == moves
    written = model().requires_grad_(requires_grad=False)
    state = {**sink.tensors, **{f"{k}.weight": w.dequantize() for k, w in sink.weights.items()}}
    written.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(written(rows).logits, made(rows).logits)
