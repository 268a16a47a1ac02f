"""Scales folded into norms: found, proved, chosen, and carried through a run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ar_schemes import scheme
from ar_tuner import AutoRound, TunerError
from ar_tuner.adapters import GenericAdapter
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.algorithms.rtn import nearest_of
from ar_tuner.algorithms.signround import block_error
from ar_tuner.blocks import WeightRef, find_blocks, is_linear
from ar_tuner.folding import Folding, apply, fold
from ar_tuner.folding.finding import norms_of
from ar_tuner.folding.fold import folding_of, offset_of
from ar_tuner.folding.scales import chosen, rounding_error
from ar_tuner.folding.store import foldable
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.stages import ModelResult
from ar_tuner.walk import Call, hidden, suspended

QUICK = {"nsamples": 8, "seqlen": 32, "batch_size": 4, "bits": 2, "group_size": 32, "fold": True}


def uneven(made: nn.Module) -> nn.Module:
    """Return a model with norms whose channels differ by far, as those of trained models do."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in made.modules():
            if "norm" in type(module).__name__.lower():
                for key, p in module.named_parameters(recurse=False):
                    noise = torch.randn(p.shape, generator=g)
                    p.copy_(noise * 0.2 if key == "bias" else noise.mul(1.2).exp())
            if is_linear(module):
                module.weight.mul_(3.0)
    return made


def task_of(made: nn.Module, rows: torch.Tensor, name: str = "W2A16", index: int = 0) -> BlockTask:
    """Return the task of one block, with the float model's inputs."""
    adapter = GenericAdapter()
    block = find_blocks(made, adapter).blocks[index]
    with suspended(adapter.entry(made), [block.module], [adapter.inputs(made, rows)]) as frames:
        call = frames[0].call
        with torch.no_grad():
            output = hidden(block.module(*call.args, **call.kwargs))
    wanted = scheme(name).with_overrides({"group_size": 32})
    targets = tuple(
        Target(
            WeightRef(f"{block.name}.{n}", f"{n}.weight", transposed=not isinstance(m, nn.Linear)),
            wanted,
        )
        for n, m in block.module.named_modules()
        if is_linear(m)
    )
    return BlockTask(
        block=block.module,
        name=block.name,
        targets=targets,
        inputs=RowBank.of([Call(0, call.args, call.kwargs)], [len(rows)]),
        reference=rows_of([output]),
        settings=TuneSettings(batch_size=8),
        report=lambda *_: None,
    )


def fed(task: BlockTask) -> dict[str, list[str]]:
    return {f.norm: [t.ref.parameter for t in f.targets] for f in norms_of(task)}


# --- which norm feeds which layers ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_norms_are_found_by_what_they_feed(model, rows, kind) -> None:
    assert fed(task_of(model(kind), rows)) == {
        "input_layernorm": [f"self_attn.{n}_proj.weight" for n in "qkv"],
        "post_attention_layernorm": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    }


def test_norms_behind_layers_are_no_concern_of_theirs(model, rows) -> None:
    assert set(fed(task_of(model("gemma2"), rows))) == {
        "input_layernorm",
        "pre_feedforward_layernorm",
    }


def test_a_norm_that_feeds_a_layer_which_stays_is_left_alone(model, rows) -> None:
    task = task_of(model(), rows)
    kept = tuple(t for t in task.targets if "v_proj" not in t.ref.parameter)
    task = BlockTask(**{**vars(task), "targets": kept})
    assert set(fed(task)) == {"post_attention_layernorm"}


def test_a_norm_that_feeds_a_router_is_left_alone(model, rows) -> None:
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


# --- what folding leaves as it is -------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "offset"), [("llama", 0.0), ("qwen3", 0.0), ("gemma2", 1.0), ("gpt2", 0.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_folded_block_gives_what_it_gave(model, rows, kind, offset, dtype) -> None:
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


def test_a_gain_of_zero_stays_and_so_do_its_weights(model, rows) -> None:
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


# --- what is chosen ---------------------------------------------------------------------------


def spec_of(name: str):
    return scheme(name).with_overrides({"group_size": 32}).weight


def test_strong_channels_of_small_weights_are_scaled_up_and_rounding_loses_less() -> None:
    g = torch.Generator().manual_seed(1)
    strength = torch.ones(64)
    strength[::16] = 20.0
    x = torch.randn(512, 64, generator=g) * strength
    weight, spec = torch.randn(32, 64, generator=g) / strength, spec_of("W4A16")
    gram = x.t() @ x / len(x)
    factor = chosen([weight], [spec], gram)
    assert factor is not None
    assert factor[::16].min() > 1.5 * factor[1]
    one = torch.ones(64)
    assert rounding_error([weight], [spec], gram, factor) < 0.9 * rounding_error(
        [weight], [spec], gram, one
    )


def test_equal_channels_are_left_as_they_are() -> None:
    weight = torch.ones(32, 64) * torch.tensor([1.0, -1.0]).repeat(32)
    assert chosen([weight], [spec_of("W4A16")], torch.eye(64)) is None


def test_a_folded_block_loses_less_when_rounded(model, rows) -> None:
    task = task_of(uneven(model()), rows)
    before = block_error(task, nearest_of(task))
    folding = fold(task)
    assert folding
    apply(task.block, task.targets, folding)
    assert block_error(task, nearest_of(task)) < before


# --- through a run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "rtn"},
        {"recipe": "opt_rtn"},
        {"recipe": "fast", "iters": 2},
        {"algorithm": "signround", "iters": 2},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_every_algorithm_takes_it_and_the_checkpoint_is_the_model(
    model, rows, sinks, tmp_path, options
) -> None:
    made = uneven(model())
    floats = copy.deepcopy(made.state_dict())
    job = AutoRound(made, dataset=rows, **{**QUICK, **options})
    job.quantize_and_save(tmp_path / "out", format="memory")
    sink = sinks[-1]
    moved = [k for k, v in sink.tensors.items() if "norm" in k and not torch.equal(v, floats[k])]
    assert moved
    assert all("layernorm" in k for k in moved)
    written = model().requires_grad_(requires_grad=False)
    state = {**sink.tensors, **{f"{k}.weight": w.dequantize() for k, w in sink.weights.items()}}
    written.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(written(rows).logits, made(rows).logits)


def test_folding_without_it_changes_nothing_but_rounding(model, rows) -> None:
    """At 8 bits little is lost either way: a fold that did not cancel would show."""
    logits = []
    made = uneven(model())
    with torch.no_grad():
        logits.append(made(rows).logits)
    for on in (False, True):
        options = {**QUICK, "bits": 8, "fold": on, "recipe": "opt_rtn"}
        quantized, _ = AutoRound(copy.deepcopy(made), dataset=rows, **options).quantize()
        with torch.no_grad():
            logits.append(quantized(rows).logits)
    plain, folded = ((x - logits[0]).square().mean() for x in logits[1:])
    assert folded < 4 * plain


def test_a_killed_run_goes_on_with_what_was_folded(model, rows, sinks, tmp_path) -> None:
    class Killed(BaseException):
        pass

    def kill(event) -> None:
        if event.to_dict()["kind"] == "block_started" and event.index == 1:
            raise Killed

    options = {**QUICK, "recipe": "fast", "iters": 2}
    AutoRound(uneven(model()), dataset=rows, **options).quantize_and_save(
        tmp_path / "whole", format="memory"
    )
    whole = sinks[-1]
    job = AutoRound(uneven(model()), dataset=rows, on_event=kill, **options)
    with pytest.raises(Killed):
        job.quantize_and_save(tmp_path / "out", format="memory")
    job = AutoRound(uneven(model()), dataset=rows, resume=True, **options)
    job.quantize_and_save(tmp_path / "out", format="memory")
    resumed = sinks[-1]
    assert set(whole.tensors) == set(resumed.tensors)
    assert all(torch.equal(whole.tensors[k], resumed.tensors[k]) for k in whole.tensors)
    assert all(torch.equal(whole.weights[k].codes, resumed.weights[k].codes) for k in whole.weights)


@pytest.mark.parametrize(
    "options", [{}, {"token_weights": True, "block_steps": 2}], ids=["", "all"]
)
def test_blocks_that_come_from_disk_come_back_folded(model, rows, sinks, tmp_path, options) -> None:
    uneven(model()).save_pretrained(tmp_path / "float")
    logits = []
    for low in (True, False):
        job = AutoRound(
            tmp_path / "float",
            dataset=rows,
            recipe="fast",
            iters=2,
            low_cpu_mem_usage=low,
            **QUICK,
            **options,
        )
        written = job.quantize_and_save(tmp_path / f"out{low}", format="memory")
        with torch.no_grad():
            logits.append(written.model(rows).logits)
    one, two = [s for s in sinks if s.state == "committed"]
    assert set(one.tensors) == set(two.tensors)
    assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors)
    assert all(torch.equal(one.weights[k].codes, two.weights[k].codes) for k in one.weights)
    assert torch.equal(*logits)


def test_the_stage_starts_from_the_folded_model(model, sinks, tmp_path, monkeypatch) -> None:
    many = torch.randint(0, 128, (64, 32), generator=torch.Generator().manual_seed(1))
    made = uneven(model())
    with torch.no_grad():
        float_logits = made(many[:4]).logits
    teachers = []

    class Look:
        name = "look"

        def refine(self, task):
            with torch.no_grad():
                teachers.append(task.logits({}, many[:4], False))  # noqa: FBT003
            return ModelResult()

    monkeypatch.setattr("ar_tuner.job.stage", lambda name: Look())
    job = AutoRound(made, dataset=many, **{**QUICK, "iters": 2, "recipe": "light"})
    job.quantize_and_save(tmp_path / "out", format="memory")
    error = (teachers[0] - float_logits).square().mean()
    assert error < 1e-6 * float_logits.square().mean()
    state = sinks[-1].tensors
    gains = {k: v for k, v in made.state_dict().items() if "norm" in k}
    assert all(torch.equal(state[k], v) for k, v in gains.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": "yes"}, "fold 'yes' is not allowed"),
        ({"fold": True, "nblocks": 2}, "fold looks at one block at a time"),
    ],
)
def test_what_cannot_be_folded_is_refused_before_work(model, options, message) -> None:
    with pytest.raises(TunerError, match=message):
        AutoRound(model(), **options)
