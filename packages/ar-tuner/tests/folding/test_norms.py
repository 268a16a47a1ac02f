"""Scales folded into norms: found, proved, carried."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ar_schemes import scheme
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.blocks import WeightRef
from ar_tuner.folding import Folding, apply, fold
from ar_tuner.folding.finding import norms_of
from ar_tuner.folding.fold import folding_of, offset_of
from ar_tuner.folding.store import foldable
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call


def fed(task: BlockTask) -> dict[str, list[str]]:
    return {f.norm: [t.ref.parameter for t in f.targets] for f in norms_of(task)}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_norms_are_found_by_what_they_feed(model, rows, kind, task_of) -> None:
    assert fed(task_of(model(kind), rows)) == {
        "input_layernorm": [f"self_attn.{n}_proj.weight" for n in "qkv"],
        "post_attention_layernorm": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    }


def test_norms_behind_layers_are_no_concern_of_theirs(model, rows, task_of) -> None:
    assert set(fed(task_of(model("gemma2"), rows))) == {
        "input_layernorm",
        "pre_feedforward_layernorm",
    }


def test_a_norm_that_feeds_a_layer_which_stays_is_left_alone(model, rows, task_of) -> None:
    task = task_of(model(), rows)
    kept = tuple(t for t in task.targets if "v_proj" not in t.ref.parameter)
    task = BlockTask(**{**vars(task), "targets": kept})
    assert set(fed(task)) == {"post_attention_layernorm"}


def test_a_norm_that_feeds_a_router_is_left_alone(model, rows, task_of) -> None:
    task = task_of(model("qwen3_moe"), rows)
    assert set(fed(task)) == {"input_layernorm"}


class Twice(nn.Module):
    """A block that uses what its norm makes beside the layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return y + self.layer(y)


def custom(block: nn.Module, rows: int = 8) -> BlockTask:
    x = torch.randn(rows, 4, 32, generator=torch.Generator().manual_seed(2))
    block = block.requires_grad_(requires_grad=False)
    target = Target(WeightRef("b.layer", "layer.weight", transposed=False), scheme("W2A16"))
    return BlockTask(
        block=block,
        name="b",
        targets=(target,),
        inputs=RowBank.of([Call(0, (x,), {})], [rows]),
        reference=rows_of([block(x)]),
        settings=TuneSettings(batch_size=8),
        report=lambda *_: None,
    )


def test_a_norm_with_another_use_that_no_hook_sees_is_left_alone_and_said_so() -> None:
    torch.manual_seed(0)
    said: list[str] = []
    task = BlockTask(**{**vars(custom(Twice())), "note": said.append})
    (found,) = norms_of(task)
    assert offset_of(task, found) is None
    assert not fold(task)
    assert "b.norm is not folded" in said[0]


@pytest.mark.parametrize(
    ("kind", "offset"), [("llama", 0.0), ("qwen3", 0.0), ("gemma2", 1.0), ("gpt2", 0.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_folded_block_gives_what_it_gave(
    model, rows, kind, offset, dtype, uneven, task_of
) -> None:
    task = task_of(uneven(model(kind)).to(dtype), rows)
    norms = norms_of(task)
    assert len(norms) == 2
    out = Folding()
    for found in norms:
        assert offset_of(task, found) == offset
        channels = task.block.get_parameter(found.parameters[0]).shape
        factor = torch.randn(channels, generator=torch.Generator().manual_seed(4)).exp()
        out = out.joined(folding_of(task, found, factor, offset))
    before = [p.clone() for p in task.block.parameters()]
    apply(task.block, task.targets, out)
    assert sum(not torch.equal(a, b) for a, b in zip(before, task.block.parameters(), strict=True))
    with torch.no_grad():
        output, reference = task.run({}, list(range(8)))
    error = (output.float() - reference.float()).square().mean().sqrt()
    size = reference.float().square().mean().sqrt()
    assert error < (1e-5 if dtype is torch.float32 else 4e-2) * size


def test_a_gain_of_zero_stays_and_so_do_its_weights(model, rows, uneven, task_of) -> None:
    made = uneven(model())
    made.model.layers[0].input_layernorm.weight[3] = 0.0
    task = task_of(made, rows)
    found = norms_of(task)[0]
    folding = folding_of(task, found, torch.full((64,), 2.0), 0.0)
    gain, columns = folding.tensors[found.parameters[0]], folding.columns
    assert gain[3] == 0
    assert all(factor[3] == 1 and factor[4] == 2 for factor in columns.values())


def test_a_folding_survives_the_journal() -> None:
    made = Folding({"norm.weight": torch.ones(3)}, {"q.weight": torch.arange(3.0)})
    again = Folding.from_tensors(made.to_tensors())
    assert torch.equal(again.tensors["norm.weight"], made.tensors["norm.weight"])
    assert torch.equal(again.columns["q.weight"], made.columns["q.weight"])
    assert set(again.tensors) == {"norm.weight"}
    assert not Folding()


def test_parameters_of_two_modules_or_without_a_name_in_the_files_stay(model) -> None:
    made = model()
    made.model.layers[1].input_layernorm.weight = made.model.layers[0].input_layernorm.weight
    names = dict.fromkeys(made.state_dict())
    names.pop("model.norm.weight")
    may = foldable(made, names)
    assert not may("model.layers.0.input_layernorm.weight")
    assert not may("model.norm.weight")
    assert may("model.layers.0.post_attention_layernorm.weight")
