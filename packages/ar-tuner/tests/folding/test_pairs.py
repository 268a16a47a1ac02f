"""Scales folded into rows of the layer before: found, proved, refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from ar_schemes import scheme
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.folding import Folding, apply, fold
from ar_tuner.folding.fold import paired_folding, proved
from ar_tuner.folding.pairs import pairs_of
from ar_tuner.folding.scales import candidates
from ar_tuner.parts import WeightRef
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call

WIDTH, INNER = 32, 48


def named(task: BlockTask) -> dict[str, str]:
    pairs = pairs_of(task)
    return {p.taker.ref.parameter: p.source.ref.parameter for p in pairs}


ATTENTION = {"self_attn.o_proj.weight": "self_attn.v_proj.weight"}
MLP = {"mlp.down_proj.weight": "mlp.up_proj.weight"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", ATTENTION | MLP),
        ("qwen3", ATTENTION | MLP),
        ("gemma2", ATTENTION | MLP),
        ("gpt_oss", ATTENTION),
        ("gpt2", {"attn.c_proj.weight": "attn.c_attn.weight"}),
        ("deepseek_v3", {"self_attn.o_proj.weight": "self_attn.kv_b_proj.weight"} | MLP),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_pairs_are_found_by_what_follows_what(
    model, rows, task_of, uneven, kind, expected, dtype
) -> None:
    task = task_of(uneven(model(kind)).to(dtype), rows)
    assert named(task) == expected
    assert all(proved(task, pair) for pair in pairs_of(task))


def test_query_heads_that_share_a_value_head_follow_the_same_rows(model, rows, task_of) -> None:
    task = task_of(model(), rows)  # 4 heads of 16, 2 of them for each of 2 value heads
    attention, mlp = pairs_of(task)
    heads = torch.arange(32).view(2, 16)
    assert torch.equal(attention.rows, heads[[0, 0, 1, 1]].flatten())
    assert torch.equal(mlp.rows, torch.arange(96))


def test_values_are_told_from_queries_and_keys_of_one_layer(model, rows, task_of) -> None:
    (attention,) = pairs_of(task_of(model("gpt2"), rows))
    assert torch.equal(attention.rows, torch.arange(128, 192))
    attention, _ = pairs_of(task_of(model("deepseek_v3"), rows))  # heads of 16 for k, then v
    assert torch.equal(attention.rows, torch.arange(128).view(4, 2, 16)[:, 1].flatten())


def test_a_gate_behind_attention_is_no_hindrance_and_a_convolution_before_it_is(
    model, rows, task_of
) -> None:
    made = model("qwen3_next")
    assert "linear_attn.out_proj.weight" not in named(task_of(made, rows))
    found = named(task_of(made, rows, index=1))
    assert found | ATTENTION == found


class Mlp(nn.Module):
    """An MLP of any shape, with biases."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(WIDTH, INNER * (2 if how in ("halves", "turns") else 1))
        self.second = nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.how == "halves":
            gate, y = y.chunk(2, -1)
            y = nn.functional.silu(gate) * y
        elif self.how == "turns":
            y = nn.functional.silu(y[..., ::2]) * y[..., 1::2]
        elif self.how == "reversed":
            y = y.flip(-1)
        elif self.how == "leaking":
            return self.second(y) + y[..., :WIDTH]
        else:
            y = getattr(nn.functional, self.how)(y)
        return self.second(y)


def mlp(how: str, name: str = "W2A16") -> tuple[BlockTask, list[str]]:
    torch.manual_seed(1)
    block, said = Mlp(how).requires_grad_(requires_grad=False), []
    x, wanted = torch.randn(8, 6, WIDTH), scheme(name)
    if name != "FPW8A16":
        wanted = wanted.with_overrides({"group_size": 16})
    targets = tuple(
        Target(WeightRef(f"b.{n}", f"{n}.weight", transposed=False), wanted)
        for n in ("first", "second")
    )
    task = BlockTask(
        block=block,
        name="b",
        targets=targets,
        inputs=RowBank.of([Call(0, (x,), {})], [8]),
        reference=rows_of([block(x)]),
        settings=TuneSettings(batch_size=8),
        report=lambda *_: None,
        note=said.append,
    )
    return task, said


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ("relu", torch.arange(INNER)),
        ("leaky_relu", torch.arange(INNER)),
        ("reversed", torch.arange(INNER).flip(0)),
        ("halves", torch.arange(INNER, 2 * INNER)),
        ("turns", torch.arange(1, 2 * INNER, 2)),
    ],
)
def test_layers_with_only_scaling_between_them_are_a_pair(how, rows) -> None:
    task, said = mlp(how)
    (pair,) = pairs_of(task)
    assert torch.equal(pair.rows, rows)
    assert proved(task, pair)
    assert not said


@pytest.mark.parametrize("how", ["silu", "gelu", "tanh", "sigmoid"])
def test_other_functions_between_them_are_told_and_left_alone(how) -> None:
    task, said = mlp(how)
    assert not pairs_of(task)
    assert "b.second is not folded into a layer before it" in said[0]


def test_rows_with_another_use_are_found_by_the_proof_and_told() -> None:
    task, said = mlp("leaking")
    (pair,) = pairs_of(task)
    assert not proved(task, pair)
    assert not fold(task)
    assert "b.second is not folded into b.first: rows of that are used elsewhere too" in said


def test_a_channel_that_never_passes_a_relu_follows_its_own_row() -> None:
    task, _ = mlp("relu")
    task.block.first.bias[5] = -100.0
    (pair,) = pairs_of(task)
    assert torch.equal(pair.rows, torch.arange(INNER))


@pytest.mark.parametrize("how", ["relu", "halves", "turns"])
def test_a_bias_is_scaled_too(how) -> None:
    task, _ = mlp(how)
    (pair,) = pairs_of(task)
    folding = paired_folding(task, pair, torch.linspace(0.3, 3, INNER))
    assert set(folding.tensors) == {"first.bias"}
    apply(task.block, task.targets, folding)
    output, reference = task.run({}, list(range(8)))
    torch.testing.assert_close(output, reference)


def test_a_bias_that_is_not_its_own_stays_and_so_does_the_pair() -> None:
    task, said = mlp("relu")
    task.block.second.weight.mul_(torch.logspace(-1.5, 1.5, INNER))
    assert fold(task)
    assert not fold(task, allowed=lambda parameter: parameter != "first.bias")
    assert "its bias is not its own" in said[-1]


def test_scales_that_rows_share_are_left_alone() -> None:
    task, said = mlp("relu", "FPW8A16")
    assert not fold(task)
    assert "scales there are shared by its rows" in said[0]


def test_layers_whose_activations_are_quantized_are_left_alone() -> None:
    task, said = mlp("relu")
    task.block.second.weight.mul_(torch.logspace(-1.5, 1.5, INNER))
    acting = scheme("INT8").activation
    first, second = task.targets
    taker = replace(second, scheme=replace(second.scheme, activation=acting))
    assert fold(task)
    assert not fold(replace(task, targets=(first, taker)))
    assert not said


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2", "deepseek_v3", "qwen3_next"])
def test_a_block_gives_what_it_gave(model, rows, task_of, uneven, kind) -> None:
    task = task_of(uneven(model(kind)), rows, index=int(kind == "qwen3_next"))
    out = Folding()
    generator = torch.Generator().manual_seed(4)
    for pair in pairs_of(task):
        by_row = torch.randn(len(task.weight(pair.source)), generator=generator).exp()
        out = out.joined(paired_folding(task, pair, by_row[pair.rows]))
    before = copy.deepcopy(task.block.state_dict())
    apply(task.block, task.targets, out)
    moved = {k for k, v in task.block.state_dict().items() if not torch.equal(v, before[k])}
    assert moved >= {t.ref.parameter for t in task.targets if t.ref.layer in out.rows}
    output, reference = task.run({}, list(range(8)))
    torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-4)


def test_channels_that_follow_one_row_get_one_factor() -> None:
    generator = torch.Generator().manual_seed(2)
    alike = torch.arange(16).repeat(2)
    weight, energy = torch.randn(8, 32, generator=generator), torch.rand(32, generator=generator)
    for factor in candidates([weight], energy, alike=alike):
        assert torch.equal(factor[:16], factor[16:])
        assert len(factor[:16].unique()) == 16


def test_strong_value_channels_are_folded_with_their_heads(model, rows, task_of) -> None:
    made = model()
    attention = made.model.layers[0].self_attn
    attention.v_proj.weight[3] *= 20  # of both query heads that share the first value head
    attention.o_proj.weight[:, [3, 19]] /= 20
    folding = fold(task_of(made, rows, "W4A16"))
    columns = folding.columns["model.layers.0.self_attn.o_proj"]
    kept = folding.rows["model.layers.0.self_attn.v_proj"]
    assert columns[3] == columns[19] > 2 * columns[4]
    assert torch.allclose(kept[3] * columns[3], torch.tensor(1.0))


def test_rows_survive_the_journal() -> None:
    made = Folding({"v.bias": torch.ones(3)}, {"b.o": torch.arange(3.0)}, {"b.v": torch.ones(2)})
    again = Folding.from_tensors(made.to_tensors())
    assert torch.equal(again.rows["b.v"], made.rows["b.v"])
    assert set(again.columns) == {"b.o"}
