"""Experts in one parameter: found, named, seen, tuned, told of, put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ar_schemes import scheme
from ar_tuner import AutoRound, TunerError
from ar_tuner.adapters import GenericAdapter
from ar_tuner.algorithms.importance import metered
from ar_tuner.algorithms.second_order.curvature import curvature
from ar_tuner.algorithms.second_order.many import solve_many
from ar_tuner.algorithms.second_order.solve import Problem, solve
from ar_tuner.blocks import find_blocks
from ar_tuner.events import BlockDone, ExpertTokens, Note
from ar_tuner.parts import WeightRef, assembled
from ar_tuner.watching import watching

KINDS = ("qwen3_moe", "mixtral", "gpt_oss", "llama4", "deepseek_v3", "qwen3_next")
FIRST = {
    "qwen3_moe": "model.layers.1.mlp.experts.0.gate_proj",
    "mixtral": "model.layers.1.block_sparse_moe.experts.0.w1",
    "gpt_oss": "model.layers.1.mlp.experts.0.gate_proj",
    "llama4": "model.layers.1.feed_forward.experts.0.gate_proj",
    "deepseek_v3": "model.layers.1.mlp.experts.0.gate_proj",
    "qwen3_next": "model.layers.1.mlp.experts.0.gate_proj",
}
ROUTED = {"llama4": 1}
ROUTERS = {"mixtral": "block_sparse_moe.gate", "gpt_oss": "mlp.router"}
ROUTERS |= {"llama4": "feed_forward.router"}


def block_of(made: Any) -> Any:
    return find_blocks(made, GenericAdapter()).blocks[1]


def inputs_of(block: Any, made: Any, rows: torch.Tensor) -> tuple[Any, Any]:
    """Return what the block is given for some rows."""
    seen: list[tuple[Any, Any]] = []
    handle = block.module.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args, kwargs)),
        with_kwargs=True,  # noqa: ARG005
    )
    with torch.no_grad():
        made(input_ids=rows, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_tensors_of_the_files(kind, model, tmp_path) -> None:
    made = model(kind)
    made.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    block = block_of(made)
    parts = block.experts.parts
    assert parts[0].layer == FIRST[kind]
    assert len(parts) == 12
    for ref in parts:
        view = ref.view(block.module.get_parameter(ref.parameter))
        stored = files.get(f"{ref.layer}.weight")
        if stored is not None:
            assert torch.equal(view, stored)
    named = sum(f"{ref.layer}.weight" in files for ref in parts)
    assert named == (0 if kind in ("gpt_oss", "llama4") else 12)


def test_interleaved_and_transposed_experts_are_told_apart(model) -> None:
    block = block_of(model("gpt_oss"))
    stored = block.module.mlp.experts.gate_up_proj
    gate, up = (r.view(stored) for r in block.experts.parts[:2])
    assert torch.equal(gate, stored[0, :, 0::2].t())
    assert torch.equal(up, stored[0, :, 1::2].t())
    block = block_of(model("llama4"))
    stored = block.module.feed_forward.experts.gate_up_proj
    gate, up = (r.view(stored) for r in block.experts.parts[:2])
    assert torch.equal(gate, stored[0, :, :96].t())
    assert torch.equal(up, stored[0, :, 96:].t())


@pytest.mark.parametrize("kind", KINDS)
def test_routers_stay_and_say_why(kind, model) -> None:
    plan = AutoRound(model(kind), group_size=32).plan()
    name = f"model.layers.1.{ROUTERS.get(kind, 'mlp.gate')}"
    assert "router" in plan[name].reason
    assert not plan[name].quantized


def test_parts_are_put_back_with_their_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(3, 6, 8, generator=generator)  # [E, I, O], gate and up row by row
    refs = [
        WeightRef(f"{e}.{i}", "x", transposed=True, expert=e, rows=(i, 8, 2))
        for e in range(3)
        for i in range(2)
    ]
    new = [torch.randn(4, 6, generator=generator).requires_grad_() for _ in refs]
    made = assembled(zip(refs, new, strict=True), lambda _: stored)["x"]
    factor = torch.randn(3, 6, 8, generator=generator)
    (made * factor).sum().backward()
    for ref, weight in zip(refs, new, strict=True):
        assert torch.equal(ref.view(made), weight)
        assert torch.equal(weight.grad, ref.view(factor))
    some = assembled([(refs[0], new[0])], lambda _: stored)["x"]
    assert torch.equal(some[1:], stored[1:])
    assert torch.equal(refs[1].view(some), refs[1].view(stored))


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_expert_is_given_is_seen(kind, model, rows) -> None:
    made = model(kind)
    block = block_of(made)
    args, kwargs = inputs_of(block, made, rows[:2])
    targets = [type("T", (), {"ref": ref}) for ref in block.experts.parts]
    with torch.no_grad():
        plain = block.module(*args, **kwargs)
        with metered(block.module, targets) as energy:
            watched = block.module(*args, **kwargs)
    plain, watched = (o[0] if isinstance(o, tuple) else o for o in (plain, watched))
    torch.testing.assert_close(plain, watched)
    for tails in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        tokens = [n for layer, n in energy.tokens.items() if layer.endswith(tails)]
        assert sum(tokens) == rows[:2].numel() * ROUTED.get(kind, 2)
    means = energy.means()
    first = next(ref for ref in block.experts.parts if ref.layer in means)
    assert means[first.layer].shape == (
        first.view(block.module.get_parameter(first.parameter)).shape[1],
    )


def test_inputs_of_an_expert_are_those_its_router_sends(model, rows) -> None:
    made = model("qwen3_moe")
    block = block_of(made)
    given: dict[str, torch.Tensor] = {}
    args, kwargs = inputs_of(block, made, rows[:2])
    caught: list[Any] = []
    experts = block.module.mlp.experts
    handle = experts.register_forward_pre_hook(lambda m, a: caught.append(a))  # noqa: ARG005

    def watch(refs: Any, x: torch.Tensor) -> None:
        given.update({ref.layer: x for ref in refs})

    with torch.no_grad(), watching(block.module, block.experts.parts, watch):
        block.module(*args, **kwargs)
    handle.remove()
    states, chosen, _ = caught[0]
    for expert in range(4):
        mine = states[(chosen == expert).any(-1)]
        seen = given[f"model.layers.1.mlp.experts.{expert}.up_proj"]
        assert torch.equal(seen.sort(0).values, mine.sort(0).values)  # the loop has its own order


@pytest.mark.parametrize("algorithm", ["signround", "second_order", "opt_rtn"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_block_loses_more_than_by_rounding_to_nearest(kind, algorithm, model, rows) -> None:
    done: list[BlockDone] = []

    def note(event: Any) -> None:
        if isinstance(event, BlockDone):
            done.append(event)

    recipe = {"recipe": "opt_rtn"} if algorithm == "opt_rtn" else {"algorithm": algorithm}
    steps = {} if algorithm == "opt_rtn" else {"iters": 8, "distill": False}
    made = model(kind)
    job = AutoRound(
        made,
        scheme="W4A16" if algorithm == "signround" else "W2A16",
        group_size=32,
        dataset=rows,
        nsamples=8,
        seqlen=32,
        batch_size=4,
        on_event=note,
        **recipe,
        **steps,
    )
    before = block_of(made).module.state_dict()
    before = {k: v.clone() for k, v in before.items() if "experts" in k and v.ndim == 3}
    job.quantize()
    after = block_of(made).module.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    assert len(done) == 2
    assert all(event.loss_after <= event.loss_before for event in done)


def test_experts_of_one_layer_get_one_scheme(model) -> None:
    job = AutoRound(model("qwen3_moe"), group_size=32, layer_config={"experts.1": {"bits": 8}})
    with pytest.raises(TunerError, match="no engine runs experts of one layer differently"):
        job.plan()
    rules = {"experts": {"bits": 8}}
    plan = AutoRound(model("qwen3_moe"), group_size=32, layer_config=rules).plan()
    bits = {r.scheme.weight.bits for r in plan.quantized if r.layer.role == "experts"}
    assert bits == {8}


def test_the_mixed_preset_gives_experts_fewer_bits(model) -> None:
    made = model("mixtral", hidden_size=128, intermediate_size=128)
    plan = AutoRound(made, scheme="W4A16_MIXED").plan()
    bits = {(r.layer.role, r.scheme.weight.bits) for r in plan.quantized}
    assert bits == {("experts", 4), ("linear", 8)}


@pytest.mark.parametrize("flat", [False, True], ids=["codes", "scales"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_the_stage_moves_experts(kind, flat, model, rows) -> None:
    made = model(kind)
    many = torch.cat([rows, rows.flip(0), rows.flip(1), rows.roll(3, 1)])
    job = AutoRound(
        made,
        scheme="W2A16",
        group_size=32,
        dataset=many,
        nsamples=8,
        seqlen=32,
        batch_size=4,
        iters=2,
        distill="scales" if flat else True,
    )
    events: list[Any] = []
    job._listener = events.append
    job.quantize()
    (ended,) = [e for e in events if e.kind == "stage_done"]
    assert ended.loss_after <= ended.loss_before


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_every_tensor_once_under_its_source_name(kind, model, tmp_path, sinks) -> None:
    made = model(kind)
    made.save_pretrained(tmp_path / "source")
    names = set(load_file(tmp_path / "source" / "model.safetensors"))
    for origin in (str(tmp_path / "source"), made):
        job = AutoRound(origin, group_size=32, recipe="rtn")
        job.quantize_and_save(tmp_path / f"out-{isinstance(origin, str)}", "memory")
        sink = sinks[-1]
        written = {f"{name}.weight" for name in sink.weights} | set(sink.tensors)
        fused = {n for n in names if n.endswith(("gate_up_proj", "experts.down_proj"))}
        parts = {
            f"{r.layer}.weight"
            for b in find_blocks(made, GenericAdapter()).blocks
            for r in b.experts.parts
        }
        assert written == (names - fused) | parts
        assert not set(sink.weights) & set(sink.tensors)


def test_tokens_of_each_expert_are_told(model, rows) -> None:
    told: list[Any] = []
    job = AutoRound(
        model("mixtral"), group_size=32, recipe="opt_rtn", dataset=rows, nsamples=8, seqlen=32
    )
    job._listener = told.append
    job.quantize()
    events = [e for e in told if isinstance(e, ExpertTokens)]
    assert [e.name for e in events] == [
        f"model.layers.{i}.block_sparse_moe.experts" for i in range(2)
    ]
    assert all(sum(e.tokens) == 2 * rows.numel() and len(e.tokens) == 4 for e in events)


def test_experts_that_get_few_tokens_are_told_of(model, rows) -> None:
    made = model("qwen3_moe")
    told: list[Any] = []
    for algorithm in ("second_order", "signround"):
        job = AutoRound(
            made,
            group_size=32,
            algorithm=algorithm,
            iters=2,
            distill=False,
            dataset=rows[:2],
            nsamples=2,
            seqlen=32,
            on_event=told.append,
        )
        job.quantize()
    texts = [e.text for e in told if isinstance(e, Note)]
    assert any("experts were sent fewer than 64 calibration tokens" in text for text in texts)


def test_experts_one_below_the_other_are_kept_and_told_of() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DbrxConfig(
        d_model=64, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=128
    )
    config.ffn_config.ffn_hidden_size = 64
    config.ffn_config.moe_num_experts, config.ffn_config.moe_top_k = 4, 2
    config.attn_config.kv_n_heads, config.attn_config.rope_theta = 2, 10000.0
    plan = AutoRound(transformers.DbrxForCausalLM(config), group_size=32).plan()
    kept = {r.layer.name.rpartition(".")[2]: r for r in plan.rows if r.layer.role == "experts"}
    assert kept.keys() == {"w1", "v1", "w2"}
    assert all("one below the other" in r.reason and not r.quantized for r in kept.values())


@pytest.mark.parametrize("name", ["W2A16G32", "W4A16", "MXFP4", "NVFP4", "GGUF:Q2_K_S"])
def test_experts_solved_together_are_as_good_as_one_by_one(name) -> None:
    spec = scheme(name).weight
    assert spec is not None
    generator = torch.Generator().manual_seed(0)
    problems, curvatures = [], []
    for _ in range(3):
        mix = torch.randn(256, 256, generator=generator) + 2 * torch.eye(256)
        x = torch.randn(512, 256, generator=generator) @ mix
        curvatures.append(curvature(x.t() @ x / len(x), 0.02))
        weights = [torch.randn(rows, 256, generator=generator) for rows in (32, 64)]
        problems.append([Problem(w, spec) for w in weights])
    together = solve_many(problems, curvatures, cycles=4)
    for mine, h, found in zip(problems, curvatures, together, strict=True):
        for problem, one, many in zip(mine, solve(mine, h, cycles=4), found, strict=True):
            assert many.error == pytest.approx(one.error, rel=0.02)
            assert many.error <= one.searched
            left = h.error(problem.goal - many.weight.dequantize()).sum()
            assert float(left) == pytest.approx(many.error, rel=1e-3)
