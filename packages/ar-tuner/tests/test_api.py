from __future__ import annotations

import dataclasses

import pytest
import torch

from ar_schemes import SchemeError
from ar_tuner import AutoRound, TunerError, events
from ar_tuner.settings import Settings, make_settings

QUICK = {"iters": 3, "nsamples": 8, "seqlen": 32, "batch_size": 4, "group_size": 32}
KINDS = ("llama", "qwen3", "gemma2", "gpt2")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chain", [True, False], ids=["quantized-inputs", "float-inputs"])
def test_a_model_in_memory_is_quantized_in_place(model, rows, kind, chain) -> None:
    made = model(kind)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    seen = []
    job = AutoRound(made, dataset=rows, enable_quanted_input=chain, on_event=seen.append, **QUICK)
    quantized, plan = job.quantize()
    assert quantized is made
    changed = {k for k, v in made.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{r.layer.name}.weight" for r in plan.quantized}
    assert torch.isfinite(made(input_ids=rows).logits).all()
    done = [e for e in seen if isinstance(e, events.BlockDone)]
    assert [e.index for e in done] == [0, 1]
    assert all(e.loss_after is not None for e in done)
    assert isinstance(seen[-1], events.RunFinished)


def test_tuning_lowers_the_loss_of_every_block(model, rows) -> None:
    seen = []
    numbers = {**QUICK, "iters": 40}
    AutoRound(model(), scheme="W3A16", dataset=rows, on_event=seen.append, **numbers).quantize()
    for event in seen:
        if isinstance(event, events.BlockDone):
            assert event.loss_after < event.loss_before


def test_rtn_needs_no_data(model) -> None:
    made = model("llama")
    _, plan = AutoRound(made, recipe="rtn", group_size=32).quantize()
    assert len(plan.quantized) == 14


def test_a_quantized_head_is_rounded_too(model, rows) -> None:
    made = model("llama")
    before = made.lm_head.weight.clone()
    AutoRound(made, dataset=rows, quant_lm_head=True, **QUICK).quantize()
    assert not torch.equal(made.lm_head.weight, before)


def test_a_head_that_is_tied_stays_and_that_is_told(model, rows) -> None:
    seen = []
    made = model("qwen3")
    _, plan = AutoRound(
        made, dataset=rows, quant_lm_head=True, on_event=seen.append, **QUICK
    ).quantize()
    assert "lm_head" not in {r.layer.name for r in plan.quantized}
    told = [e.text for e in seen if isinstance(e, events.Note) and e.level == "warning"]
    assert sum("lm_head shares its weight with the embedding" in text for text in told) == 1


def test_the_sink_gets_every_tensor_once(model, rows, sinks, tmp_path) -> None:
    made = model("qwen3")
    keys = set(made.state_dict())
    job = AutoRound(made, dataset=rows, **QUICK)
    checked = []
    _, path = job.quantize_and_save(
        tmp_path / "out", format="memory", check=lambda p, of, m: checked.append((p, of))
    )
    probe, sink = sinks
    assert (probe.state, sink.state) == ("aborted", "committed")
    got = {f"{n}.weight" for n in sink.weights} | set(sink.tensors)
    assert got == keys - {"lm_head.weight"}  # tied
    assert sink.request.blocks == ("model.layers",)
    assert sink.request.config["architectures"] == ["Qwen3ForCausalLM"]
    for name, weight in sink.weights.items():
        parameter = made.get_parameter(f"{name}.weight")
        assert torch.equal(weight.dequantize(parameter.dtype), parameter)
    assert (path / "..").resolve() == tmp_path
    with pytest.raises(KeyError):
        checked[0][1]("nothing")


def test_an_interrupted_run_goes_on_to_the_same_weights(model, rows, sinks, tmp_path) -> None:
    class Stop(RuntimeError):
        pass

    def stop(event) -> None:
        if isinstance(event, events.BlockStarted) and event.index == 1:
            raise Stop

    AutoRound(model(), dataset=rows, **QUICK).quantize_and_save(tmp_path / "whole", format="memory")
    whole = sinks[-1].weights
    job = AutoRound(model(), dataset=rows, on_event=stop, **QUICK)
    with pytest.raises(Stop):
        job.quantize_and_save(tmp_path / "out", format="memory")
    assert sinks[-1].state == "aborted"
    seen = []
    job = AutoRound(model(), dataset=rows, resume=True, on_event=seen.append, **QUICK)
    job.quantize_and_save(tmp_path / "out", format="memory")
    assert next(e for e in seen if isinstance(e, events.RunStarted)).resumed_blocks == 1
    resumed = sinks[-1].weights
    assert set(resumed) == set(whole)
    assert all(torch.equal(resumed[n].codes, whole[n].codes) for n in whole)
    assert all(torch.equal(resumed[n].scale, whole[n].scale) for n in whole)


def test_a_format_nobody_writes_is_refused(model, rows, sinks, tmp_path) -> None:
    with pytest.raises(TunerError, match="no installed package writes the format 'nothing'"):
        AutoRound(model(), dataset=rows, **QUICK).quantize_and_save(
            tmp_path / "o", format="nothing"
        )
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_text_never_reaches_are_named(model, rows) -> None:
    made = model("llama")
    made.model.layers[1].forward = None
    inner = made.model.forward

    def skip(*args, **kwargs):
        kept, made.model.layers = made.model.layers, made.model.layers[:1]
        try:
            return inner(*args, **kwargs)
        finally:
            made.model.layers = kept

    made.model.forward = skip
    with pytest.raises(TunerError, match=r"never run on text.*model\.layers\.1"):
        AutoRound(made, dataset=rows, **QUICK).quantize()


def test_weights_that_are_not_finite_are_named(model, rows) -> None:
    made = model("llama")
    made.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(TunerError, match=r"NaN.*layers\.1\.mlp\.up_proj"):
        AutoRound(made, dataset=rows, **QUICK).quantize()


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ({"data_type": "nosuch", "group_size": 32}, {}, "no installed package knows"),
        ({"data_type": "mx_fp", "bits": 5, "group_size": 32}, {}, "4 or 6 or 8 bits"),
        ("BF16", {}, "quantizes no layer"),
        (
            {"bits": 8, "group_size": 32, "act_bits": 8, "act_data_type": "nosuch"},
            {},
            "activation data type 'nosuch'",
        ),
    ],
)
def test_a_scheme_that_cannot_be_computed_is_refused(model, scheme, options, message) -> None:
    with pytest.raises(TunerError, match=message):
        AutoRound(model(), scheme=scheme, **options).plan()


def test_group_sizes_that_do_not_divide_are_listed(model) -> None:
    with pytest.raises(SchemeError, match="14 layers cannot be quantized"):
        AutoRound(model(), group_size=80).plan()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"iterz": 1}, "unknown argument 'iterz'. Did you mean iters"),
        ({"recipe": "bset"}, "unknown recipe 'bset'. Did you mean best"),
        ({"scale_init": "x"}, "unknown scale_init 'x'"),
        ({"iters": True and -1}, "iters -1 is not allowed"),
        ({"lr": 0.0}, "lr 0.0 is not allowed"),
        ({"max_shard_size": "5XB"}, "max_shard_size '5XB' is not allowed"),
    ],
)
def test_a_setting_with_a_mistake_is_refused(given, message) -> None:
    with pytest.raises(TunerError, match=message):
        make_settings(given)


def test_settings_override_the_recipe() -> None:
    made = Settings(recipe="light", iters=7, ignore_layers="a, b", max_shard_size="2GiB")
    assert (made.chosen.iters, made.chosen.lr, made.chosen.nsamples) == (7, 5e-3, 128)
    assert made.ignored == ("a", "b")
    assert made.shard_bytes == 2 * 2**30
    assert dataclasses.replace(made, to_quant_block_names="x,y").block_paths == ("x", "y")


def test_an_embedding_that_is_asked_for_is_quantized(model) -> None:
    made = model()
    before = made.model.embed_tokens.weight.clone()
    job = AutoRound(made, recipe="rtn", layer_config={"embed_tokens": {"bits": 8}}, group_size=32)
    _, plan = job.quantize()
    assert plan["model.embed_tokens"].quantized
    after = made.model.embed_tokens.weight
    assert not torch.equal(before, after)
    assert torch.allclose(before, after, atol=0.01 * float(before.abs().max()))


def test_fused_experts_of_an_unknown_layout_are_kept_and_refused_if_asked_for(model) -> None:
    made = model("jetmoe")
    rows = [r for r in AutoRound(made, group_size=32).plan().rows if r.layer.role == "experts"]
    assert {r.layer.name.rpartition(".")[2] for r in rows} == {"weight"}
    assert all("unknown layout" in r.reason and not r.quantized for r in rows)
    job = AutoRound(made, layer_config={"mlp.input_linear": {"bits": 4}}, group_size=32)
    with pytest.raises(TunerError, match=r"mlp\.input_linear.*unknown layout"):
        job.plan()
