"""Layers of a quantized source that are written again as it stores them, byte for byte."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ar_cli.main import run
from ar_export import compare_checkpoints, convert, open_checkpoint, verify
from ar_export.opening import open_model
from ar_kernels import QuantLinear
from ar_schemes import ArError
from ar_tuner import AutoRound
from ar_tuner.testing import in_tiles, tiny_model, tiny_rows

if TYPE_CHECKING:
    from pathlib import Path

    from ar_export import Readable

SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 32, "moe_intermediate_size": 128},
    "deepseek_v3": {
        **{"moe_intermediate_size": 128, "kv_lora_rank": 128, "q_lora_rank": 128},
        "v_head_dim": 32,
    },
}
COMMON = {"hidden_size": 128, "intermediate_size": 256}
RTN: dict[str, Any] = {"scheme": "W4A16G32", "recipe": "rtn", "dataset": [tiny_rows(1, 16)]}
RTN |= {"nsamples": 1, "seqlen": 16}
_STORED = re.compile(r"(self_attn|mlp)\..*_proj(_with_mqa|_[ab])?\.weight$|lm_head\.weight$")
_ATTENTION = "self_attn"


def fp8_source(
    family: str, folder: Path, *, further: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a small model whose projections and head are FP8 in tiles, some of them cut."""
    model = tiny_model(family, **COMMON, **SIZES[family], tie_word_embeddings=False)
    model.to(dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if further:
        count = config["num_hidden_layers"]
        last = f"model.layers.{count - 1}."
        new = {k.replace(last, f"model.layers.{count}."): v for k, v in tensors.items()}
        tensors |= {k: v.clone() for k, v in new.items() if k not in tensors}
    stored = {}
    for name, tensor in tensors.items():
        stored[name] = tensor
        if _STORED.search(name):
            codes, scales = in_tiles(tensor.float())
            stored[name], stored[f"{name}_scale_inv"] = codes, scales
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    tile = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config["quantization_config"] = {"quant_method": "fp8", **tile}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def requantized(source: Path, folder: Path, form: str = "llm_compressor", **options: Any) -> Path:
    return AutoRound(source, **RTN | options).quantize_and_save(folder, form).path


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def as_stored(source: Path, made: Readable, layer: str) -> bool:
    """Tell whether codes and scales of a layer are those of the source, byte for byte."""
    old = load_file(source / "model.safetensors")
    scale = "weight_scale_inv" if f"{layer}.weight_scale_inv" in made.files else "weight_scale"
    pairs = (("weight", "weight"), ("weight_scale_inv", scale))
    return all(
        raw(old[f"{layer}.{a}"]) == raw(made.tensor(f"{layer}.{b}"))
        and old[f"{layer}.{a}"].dtype == made.tensor(f"{layer}.{b}").dtype
        for a, b in pairs
    )


def fp8_layers(found: Readable) -> list[str]:
    return [n for n, e in found.quantized.items() if e.scheme.weight.data_type == "fp"]


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits with activations as they are: the tuner's model has no others."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.leave_activations()
    with torch.inference_mode():
        return model(input_ids=tiny_rows(2, 24), use_cache=False).logits.float()


@pytest.mark.parametrize("family", SIZES)
def test_kept_layers_are_the_sources_bytes_and_reload_to_equal_logits(family, tmp_path) -> None:
    source = fp8_source(family, tmp_path / "fp8")
    job = AutoRound(source, ignore_layers=_ATTENTION, keep_source=True, **RTN)
    kept = {row.layer.name for row in job.plan().kept}
    assert "lm_head" in kept
    model, path = job.quantize_and_save(tmp_path / "out", "llm_compressor")
    found = open_checkpoint(path)
    assert set(fp8_layers(found)) == kept
    assert all(as_stored(source, found, layer) for layer in kept)
    assert any(e.scheme.weight.data_type == "int" for e in found.quantized.values())
    assert any(e.layout.endswith("_ragged") for e in found.quantized.values())
    report = verify(path, against=model.float())
    assert report.ok, report.findings
    assert report.logits < 1e-4
    reopened = open_model(path, torch.float32)
    assert isinstance(reopened.get_submodule("lm_head"), QuantLinear)
    torch.testing.assert_close(logits(reopened), logits(model), atol=1e-4, rtol=1e-4)


def test_tiles_over_the_edge_of_a_source_are_read_verified_and_converted(tmp_path) -> None:
    source = fp8_source("deepseek_v3", tmp_path / "fp8")
    assert verify(source).ok
    out = convert(source, tmp_path / "out", "llm_compressor")
    found = open_checkpoint(out)
    cut = [name for name, e in found.quantized.items() if e.rows % 128]
    assert cut
    assert all(as_stored(source, found, layer) for layer in cut)
    assert compare_checkpoints(source, out).same


def test_tuned_layers_are_what_they_are_without_keeping(tmp_path) -> None:
    source = fp8_source("qwen3", tmp_path / "fp8")
    options = {"recipe": "light", "iters": 2, "ignore_layers": _ATTENTION}
    plain = open_checkpoint(requantized(source, tmp_path / "a", **options))
    keeping = open_checkpoint(requantized(source, tmp_path / "b", keep_source=True, **options))
    tuned = [name for name in plain.quantized if "mlp" in name]
    assert tuned
    for layer in tuned:
        for suffix in ("weight_packed", "weight_scale"):
            name = f"{layer}.{suffix}"
            assert torch.equal(plain.tensor(name), keeping.tensor(name)), name
    assert not fp8_layers(plain)


def test_a_whole_block_is_kept_between_tuned_ones(tmp_path) -> None:
    source = fp8_source("qwen3", tmp_path / "fp8")
    options = {"recipe": "light", "iters": 2, "ignore_layers": "layers.1", "keep_source": True}
    found = open_checkpoint(requantized(source, tmp_path / "out", **options))
    blocks = {n.split(".")[2] for n in fp8_layers(found) if n != "lm_head"}
    assert blocks == {"1"}
    assert len(fp8_layers(found)) == 8
    assert verify(found.path).ok


def test_a_model_in_bfloat16_reloads_to_its_logits(tmp_path) -> None:
    source = fp8_source("qwen3", tmp_path / "fp8", dtype=torch.bfloat16)
    job = AutoRound(source, ignore_layers=_ATTENTION, keep_source=True, **RTN)
    model, path = job.quantize_and_save(tmp_path / "out", "llm_compressor")
    found = open_checkpoint(path)
    assert all(as_stored(source, found, layer) for layer in fp8_layers(found))
    report = verify(path, against=model)
    assert report.ok, report.findings


def test_the_config_has_a_group_for_what_is_kept(tmp_path) -> None:
    source = fp8_source("qwen3", tmp_path / "fp8")
    path = requantized(source, tmp_path / "out", ignore_layers=_ATTENTION, keep_source=True)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == []
    groups = {g["format"]: g for g in config["config_groups"].values()}
    fp8 = groups["float-quantized"]
    assert fp8["weights"]["block_structure"] == [128, 128]
    assert fp8["input_activations"]["dynamic"] is True
    assert groups["pack-quantized"]["weights"]["num_bits"] == 4
    named = {t for g in groups.values() for t in g["targets"]}
    assert {"lm_head", "Linear"} <= named


def test_the_word_source_keeps_single_layers(tmp_path) -> None:
    source = fp8_source("qwen3", tmp_path / "fp8")
    rules = {"lm_head": "source", "layers.0.self_attn": "source", "layers.0.mlp.up_proj": 16}
    path = requantized(source, tmp_path / "out", layer_config=rules)
    found = open_checkpoint(path)
    assert {n.rpartition(".")[0] or n for n in fp8_layers(found)} == {
        "lm_head",
        "model.layers.0.self_attn",
    }
    assert found.facts["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    said = json.loads((path / "config.json").read_text())["quantization_config"]["ignore"]
    assert said == ["model.layers.0.mlp.up_proj"]


def test_layers_that_the_model_does_not_have_are_kept_too(tmp_path) -> None:
    source = fp8_source("deepseek_v3", tmp_path / "fp8", further=True)
    path = requantized(source, tmp_path / "out", keep_source=True)
    found = open_checkpoint(path)
    count = found.config["num_hidden_layers"]
    last = [n for n in fp8_layers(found) if n.startswith(f"model.layers.{count}.")]
    assert any("experts" in name for name in last)
    assert any("self_attn" in name for name in last)
    assert all(as_stored(source, found, layer) for layer in last)
    assert verify(path).ok


@pytest.mark.parametrize("kind", ["FP8_STATIC", "INT8", "W8A16", "NVFP4"])
def test_sources_of_compressed_tensors_keep_every_tensor(demo_model, tmp_path, kind) -> None:
    options = {"nsamples": 4, "seqlen": 32} if kind in ("FP8_STATIC", "NVFP4") else {}
    first = AutoRound(demo_model, scheme=kind, recipe="rtn", **options)
    source = first.quantize_and_save(tmp_path / "source", "llm_compressor").path
    job = AutoRound(source, scheme="W4A16", recipe="rtn", ignore_layers="mlp", keep_source=True)
    path = job.quantize_and_save(tmp_path / "out", "llm_compressor").path
    old, new = load_file(source / "model.safetensors"), load_file(path / "model.safetensors")
    kept = [name for name in old if ".mlp." in name]
    assert kept
    for name in kept:
        assert old[name].dtype == new[name].dtype, name
        assert raw(old[name]) == raw(new[name]), name
    assert verify(path).ok


def test_integers_are_kept_in_the_extra_config_of_auto_round(demo_model, tmp_path) -> None:
    source = AutoRound(demo_model, scheme="W8A16", recipe="rtn").quantize_and_save(
        tmp_path / "source", "auto_round"
    )
    job = AutoRound(source.path, scheme="W4A16", recipe="rtn", ignore_layers="mlp.down_proj")
    plain = job.quantize_and_save(tmp_path / "plain").path
    job = AutoRound(
        source.path,
        scheme="W4A16",
        recipe="rtn",
        ignore_layers="mlp.down_proj",
        keep_source=True,
    )
    path = job.quantize_and_save(tmp_path / "out").path
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    assert said["bits"] == 4
    assert said["extra_config"]["model.layers.0.mlp.down_proj"] == {"bits": 8}
    old, new = (load_file(p / "model.safetensors") for p in (source.path, path))
    kept = [name for name in old if ".mlp.down_proj." in name]
    assert all(raw(old[name]) == raw(new[name]) for name in kept)
    different = {d.name for d in compare_checkpoints(plain, path).differences}
    assert all(name.endswith("mlp.down_proj") for name in different)


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("auto_round", "one packing per checkpoint.*llm_compressor"),
        ("auto_gptq", "have them dequantized"),
        ("auto_awq", "have them dequantized"),
        ("fake", "writes floats, so .* cannot stay"),
        ("gguf:q4_0", "have them dequantized|cannot"),
    ],
)
def test_a_format_that_cannot_say_so_refuses_before_work(form, why, tmp_path) -> None:
    source = fp8_source("qwen3", tmp_path / "fp8")
    seen: list[str] = []
    job = AutoRound(
        source,
        scheme=None if form.startswith("gguf") else "W4A16G32",
        recipe="rtn",
        keep_source=True,
        on_event=lambda event: seen.append(event.kind),
    )
    with pytest.raises(ArError, match=f"(?s){why}"):
        job.quantize_and_save(tmp_path / "out", form)
    assert not (tmp_path / "out").exists()
    assert "block_started" not in seen


def test_a_float_source_has_nothing_to_keep_and_says_so(demo_model, tmp_path) -> None:
    said: list[str] = []
    job = AutoRound(
        demo_model,
        scheme="W4A16",
        recipe="rtn",
        keep_source=True,
        on_event=lambda e: said.append(e.text) if e.kind == "note" else None,
    )
    job.quantize_and_save(tmp_path / "out")
    assert any(text.startswith("keep_source: the source stores no layer") for text in said)


def test_a_saved_plan_keeps_the_same_layers(tmp_path) -> None:
    source = fp8_source("qwen3", tmp_path / "fp8")
    job = AutoRound(source, ignore_layers=_ATTENTION, keep_source=True, **RTN)
    job.save_plan(tmp_path / "plan.json")
    rules = json.loads((tmp_path / "plan.json").read_text())
    again = AutoRound(source, layer_config=rules, **RTN).plan()
    assert {r.layer.name for r in again.kept} == {r.layer.name for r in job.plan().kept}


def test_the_command_line_keeps_inspects_verifies_and_converts(tmp_path, capsys) -> None:
    source, out = fp8_source("qwen3", tmp_path / "fp8"), tmp_path / "out"
    words = ["--scheme", "W4A16G32", "--ignore-layers", "self_attn", "--keep-source"]

    def told(*command: str) -> dict[str, Any]:
        assert run([*command, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    layers = {row["name"]: row for row in told("plan", str(source), *words)["layers"]}
    assert layers["lm_head"]["kept"] is True
    assert layers["lm_head"]["bits_per_weight"] < 9
    writing = ("-o", str(out), "--format", "llm_compressor", "--recipe", "rtn")
    assert told("quantize", str(source), *writing, *words)["verified"] is True
    kinds = {row["scheme"] for row in told("inspect", str(out))["layers"]}
    assert any("128x128" in kind for kind in kinds)
    assert "W4A16G32" in kinds
    assert told("verify", str(out))["ok"] is True
    again = convert(out, tmp_path / "again", "llm_compressor")
    assert compare_checkpoints(out, again).same


def test_an_interrupted_run_keeps_what_an_uninterrupted_one_keeps(tmp_path) -> None:
    source = fp8_source("qwen3", tmp_path / "fp8")
    options = {**RTN, "recipe": "light", "iters": 2, "keep_source": True}
    options |= {"ignore_layers": _ATTENTION}

    class Stop(RuntimeError):
        pass

    def stop(event: Any) -> None:
        if event.kind == "block_started" and event.index == 1:
            raise Stop

    with pytest.raises(Stop):
        AutoRound(source, on_event=stop, **options).quantize_and_save(
            tmp_path / "out", "llm_compressor"
        )
    other = AutoRound(source, resume=True, **options | {"keep_source": False})
    with pytest.raises(ArError, match="plan|settings"):
        other.quantize_and_save(tmp_path / "out", "llm_compressor")
    done = AutoRound(source, resume=True, **options)
    path = done.quantize_and_save(tmp_path / "out", "llm_compressor").path
    whole = AutoRound(source, **options).quantize_and_save(tmp_path / "whole", "llm_compressor")
    files = [p / "model.safetensors" for p in (path, whole.path)]
    assert files[0].read_bytes() == files[1].read_bytes()
