from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ar_tuner import AutoRound, TunerError, events
from ar_tuner.blocks import weights_of
from ar_tuner.loading import float_type, load_meta, open_source
from ar_tuner.names import source_files, source_tensors
from ar_tuner.source import FloatSource, Source, without_quantization
from ar_tuner.wiring import wire

KINDS = ("llama", "qwen3", "gemma2", "gpt2", "mistral", "qwen3_moe")
QUICK = {"iters": 2, "nsamples": 8, "seqlen": 32, "batch_size": 4, "group_size": 32}


@pytest.fixture
def saved(model, tmp_path):
    """Save a tiny model by its type's name, and return (directory, model)."""

    def save(kind="llama", **extra):
        made = model(kind)
        path = tmp_path / kind
        made.save_pretrained(path, **extra)
        return path, made

    return save


def tensors_of(path):
    files = source_files(path)
    return dict(source_tensors(files, files))


def rewrite(path, change):
    tensors = change(tensors_of(path))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def away(model):
    return {name for name, p in model.named_parameters() if p.is_meta}


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_model_is_the_one_that_was_saved(saved, rows, kind) -> None:
    path, made = saved(kind)
    prepared = AutoRound(path, recipe="rtn", group_size=32).prepare()
    prefixes = tuple(f"{b.name}." for b in prepared.discovery.blocks)
    named = dict(prepared.model.named_parameters())
    assert away(prepared.model) == {n for n in named if n.startswith(prefixes)}
    prepared.residence.whole()
    loaded, buffers = prepared.model.state_dict(), dict(prepared.model.named_buffers())
    assert all(torch.equal(value, loaded[name]) for name, value in made.state_dict().items())
    assert all(torch.equal(value, buffers[name]) for name, value in made.named_buffers())
    with torch.no_grad():
        assert torch.equal(prepared.model(rows).logits, made(rows).logits)


def test_tied_weights_stay_tied(saved) -> None:
    path, _ = saved("qwen3")
    prepared = AutoRound(path, recipe="rtn", group_size=32).prepare()
    prepared.residence.whole()
    assert prepared.model.lm_head.weight is prepared.model.model.embed_tokens.weight


def test_a_block_comes_with_its_weights_and_goes_without_a_trace(saved) -> None:
    path, made = saved()
    prepared = AutoRound(path, recipe="rtn", group_size=32).prepare()
    residence, first = prepared.residence, prepared.model.model.layers[0]
    everything = away(prepared.model)
    for _ in range(2):
        residence.enter(0)
        residence.enter(0)
        assert away(first) == set()
        assert residence.inside == {0}
        for name, value in made.model.layers[0].named_parameters():
            assert torch.equal(first.get_parameter(name), value)
        residence.leave(0)
        residence.leave(0)
        assert away(prepared.model) == everything


def test_a_settled_block_comes_back_with_its_final_weights(saved) -> None:
    path, made = saved()
    prepared = AutoRound(path, recipe="rtn", group_size=32).prepare()
    residence, block = prepared.residence, prepared.model.model.layers[1]
    final = torch.full_like(made.model.layers[1].mlp.up_proj.weight, 7.0)
    residence.enter(1)
    residence.settle(1, lambda: {"mlp.up_proj.weight": final})
    residence.leave(1)
    residence.enter(1)
    assert torch.equal(block.mlp.up_proj.weight, final)
    down = made.model.layers[1].mlp.down_proj.weight
    assert torch.equal(block.mlp.down_proj.weight, down)
    residence.keep = True
    residence.leave(1)
    assert away(block) == set()


def test_a_parameter_that_two_blocks_share_does_not_come_and_go(saved) -> None:
    path, _ = saved()
    job = AutoRound(path, recipe="rtn", group_size=32)
    first, second = job.blueprint().model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    from ar_tuner.blocks import Block
    from ar_tuner.streaming import comers

    blocks = [Block("model.layers.0", first), Block("model.layers.1", second)]
    names = {
        t
        for ps in comers(job.blueprint().model, blocks, job.blueprint().wiring)
        for p in ps
        for t in p.targets
    }
    assert "model.layers.0.mlp.up_proj.weight" not in names
    assert "model.layers.0.mlp.gate_proj.weight" in names


@pytest.mark.parametrize("recipe", ["rtn", "default"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_one_block_is_in_memory_at_a_time(saved, rows, tmp_path, sinks, kind, recipe) -> None:
    """Counted whenever the run says anything, and when the sink is given anything."""
    path, _ = saved(kind)
    counts, blocks = [], []

    def count(event=None) -> None:
        blocks[:] = job._prepared.discovery.blocks
        held = [b for b in blocks if len(away(b.module)) < len(list(b.module.parameters()))]
        counts.append(len(held))

    numbers = QUICK if recipe == "default" else {"group_size": 32}
    job = AutoRound(path, dataset=rows, recipe=recipe, on_event=lambda e: listen(e), **numbers)
    listen = lambda event: count() if job._prepared else None  # noqa: E731
    made = job.quantize_and_save(tmp_path / "out", format="memory", check=lambda *_: count())
    assert max(counts) == 1
    assert counts[-1] == 0, "in the check, no block is in memory unless it is called"
    assert len(counts) >= 4
    weights = sinks[-1].weights
    model, _ = made
    assert away(model) == set()
    found = 0
    for block in blocks:
        for ref in weights_of(block, list(weights)):
            stored = ref.view(model.get_parameter(f"{block.name}.{ref.parameter}"))
            assert torch.equal(weights[ref.layer].dequantize(stored.dtype), stored)
            found += 1
    assert found == len(weights)


def test_the_check_can_call_a_model_whose_blocks_are_away(saved, rows, tmp_path, sinks) -> None:
    path, _ = saved()
    seen = []

    def check(_path, _find, model) -> None:
        with torch.no_grad():
            seen.append(model(rows).logits)
        assert len(away(model.model.layers)) == 18

    job = AutoRound(path, dataset=rows, **QUICK)
    model = job.quantize_and_save(tmp_path / "out", format="memory", check=check).model
    with torch.no_grad():
        assert torch.equal(model(rows).logits, seen[0])


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_streaming_does_not_change_a_bit(saved, rows, tmp_path, sinks, kind) -> None:
    path, made = saved(kind)
    for name, low in (("a", True), ("b", False)):
        job = AutoRound(path, dataset=rows, low_cpu_mem_usage=low, **QUICK)
        job.quantize_and_save(tmp_path / name, format="memory")
    AutoRound(made, dataset=rows, **QUICK).quantize_and_save(tmp_path / "c", format="memory")
    one, two, given = (s for s in sinks if s.state == "committed")
    for other in (two, given):
        assert one.weights.keys() == other.weights.keys()
        for name, weight in one.weights.items():
            assert torch.equal(weight.codes, other.weights[name].codes)
            assert torch.equal(weight.scale, other.weights[name].scale)
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())


def test_quantizing_in_memory_ends_with_the_whole_model(saved, rows) -> None:
    path, made = saved()
    model, plan = AutoRound(path, dataset=rows, **QUICK).quantize()
    assert away(model) == set()
    other, _ = AutoRound(made, dataset=rows, **QUICK).quantize()
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in model.state_dict().items())


def test_a_run_may_be_resumed_with_other_memory_settings(saved, rows, tmp_path, sinks) -> None:
    path, _ = saved()

    class Stop(RuntimeError):
        pass

    def stop(event) -> None:
        if isinstance(event, events.BlockStarted) and event.index == 1:
            raise Stop

    AutoRound(path, dataset=rows, **QUICK).quantize_and_save(tmp_path / "a", format="memory")
    whole = sinks[-1].weights
    job = AutoRound(path, dataset=rows, on_event=stop, **QUICK)
    with pytest.raises(Stop):
        job.quantize_and_save(tmp_path / "b", format="memory")
    again = AutoRound(path, dataset=rows, resume=True, low_cpu_mem_usage=False, **QUICK)
    again.quantize_and_save(tmp_path / "b", format="memory")
    resumed = sinks[-1].weights
    assert all(torch.equal(resumed[n].codes, whole[n].codes) for n in whole)


def test_a_second_run_of_one_object_starts_from_the_floats(saved, rows, tmp_path, sinks) -> None:
    path, _ = saved()
    job = AutoRound(path, dataset=rows, **QUICK)
    kept = job.quantize_and_save(tmp_path / "a", format="memory")
    job.quantize_and_save(tmp_path / "b", format="memory")
    one, two = (s.weights for s in sinks if s.state == "committed")
    assert all(torch.equal(one[n].codes, two[n].codes) for n in one)
    assert kept[1] == kept.path == tmp_path / "a"
    assert len(kept) == 2
    assert kept[0] is kept.model
    assert away(kept.model) == set()


def test_the_blocks_of_a_run_go_with_the_last_who_could_ask(saved, tmp_path, sinks) -> None:
    path, _ = saved()
    job = AutoRound(path, recipe="rtn", group_size=32)
    made = job.quantize_and_save(tmp_path / "a", format="memory")
    folder = tmp_path / "a.run"
    assert len(list(folder.rglob("*.safetensors"))) == 2
    del made
    assert list(folder.rglob("*.safetensors")) == []
    assert {p.name for p in folder.iterdir() if p.is_dir()} <= {"blocks"}


def test_fused_experts_are_read_from_those_of_the_files(saved) -> None:
    path, made = saved("qwen3_moe")
    wiring = wire(load_meta(path, trust_remote_code=False), tensors_of(path))
    piece = wiring.pieces["model.layers.0.mlp.experts.gate_up_proj"]
    assert len(piece.sources) == 8
    assert piece.sources[0] == "model.layers.0.mlp.experts.0.gate_proj.weight"
    assert "model.layers.0.mlp.experts.gate_up_proj" not in wiring.names
    assert wiring.names["lm_head.weight"] == "lm_head.weight"
    assert wiring.unknown == ()


def test_names_up_to_a_prefix_are_found(saved, rows) -> None:
    path, made = saved()
    rewrite(path, lambda tensors: {f"outer.{n}": t for n, t in tensors.items()})
    job = AutoRound(path, recipe="rtn", group_size=32)
    assert job.blueprint().wiring.names["model.norm.weight"] == "outer.model.norm.weight"
    prepared = job.prepare()
    prepared.residence.whole()
    with torch.no_grad():
        assert torch.equal(prepared.model(rows).logits, made(rows).logits)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_checkpoint_that_lacks_tensors_is_refused(saved, name) -> None:
    path, _ = saved()
    rewrite(path, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(TunerError, match=rf"lacks 1 tensors .*{name}"):
        AutoRound(path, recipe="rtn", group_size=32).prepare()


def test_a_source_that_shrinks_meanwhile_is_noticed(saved) -> None:
    path, _ = saved()
    prepared = AutoRound(path, recipe="rtn", group_size=32).prepare()
    residence = prepared.residence
    residence._pieces[0] = residence._pieces[0][1:]
    with pytest.raises(TunerError, match=r"block model\.layers\.0 could not be read whole"):
        residence.enter(0)


def test_a_float_checkpoint_is_a_source(saved) -> None:
    path, made = saved()
    source = open_source(path)
    assert isinstance(source, Source)
    assert set(source.names) == set(made.state_dict())
    assert source.shape("model.norm.weight") == (64,)
    assert source.dtype is torch.float32
    got = dict(source.read(["model.norm.weight"]))
    assert torch.equal(got["model.norm.weight"], made.model.norm.weight)


def test_the_type_to_compute_in_is_the_one_named_or_the_checkpoints_own(tmp_path) -> None:
    save_file({"i": torch.ones(1).int(), "x": torch.ones(1).half()}, tmp_path / "model.safetensors")
    source = FloatSource.of(tmp_path)

    class Config:
        dtype = torch.bfloat16

    assert float_type("auto", Config(), source) is torch.bfloat16
    assert float_type("auto", object(), source) is torch.float16
    assert float_type("float32", Config(), source) is torch.float32
    with pytest.raises(TunerError, match="dtype 'int8' is not allowed"):
        float_type("int8", Config(), source)
    save_file({"i": torch.ones(1).int()}, tmp_path / "model.safetensors")
    assert FloatSource.of(tmp_path).dtype is torch.float32


def test_a_configuration_sheds_what_is_said_of_its_quantization() -> None:
    config = {"a": 1, "quantization_config": {}, "compression_config": {}}
    assert without_quantization(config) == {"a": 1}


def test_a_format_that_nobody_reads_is_no_source(saved) -> None:
    path, _ = saved()
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mystery"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TunerError, match=r"\(quant_method mystery\).*no installed package reads"):
        AutoRound(path)


def test_the_generation_config_comes_along(saved) -> None:
    path, made = saved()
    made.generation_config.top_k = 7
    made.generation_config.do_sample = True
    made.generation_config.save_pretrained(path)
    prepared = AutoRound(path, recipe="rtn", group_size=32).prepare()
    assert prepared.model.generation_config.top_k == 7
    assert isinstance(prepared.model, nn.Module)
    assert prepared.model.name_or_path == str(path)


@pytest.mark.parametrize("settings", [{}, {"algorithm": "signround", "nblocks": 2}])
def test_a_stage_and_windows_do_not_see_that_blocks_come_and_go(saved, tmp_path, settings) -> None:
    path, _ = saved()
    rows = torch.randint(0, 128, (32, 32), generator=torch.Generator().manual_seed(3))
    states = []
    for low in (True, False):
        seen = []
        job = AutoRound(
            str(path),
            dataset=rows,
            low_cpu_mem_usage=low,
            distill=True,
            on_event=seen.append,
            **QUICK,
            **settings,
        )
        states.append(job.quantize()[0].state_dict())
        assert [e for e in seen if isinstance(e, events.StageDone)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
