"""Checkpoints of every kind as sources: what is made of them is what is made of their floats."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from ar_export import open_checkpoint, verify
from ar_export.opening import open_dequantized
from ar_schemes import ArError
from ar_tuner import AutoRound
from ar_tuner.loading import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

RTN = {"scheme": "W4A16", "recipe": "rtn", "ignore_layers": "layers.1.self_attn.q_proj"}
QUICK = {"iters": 2, "nsamples": 8, "seqlen": 32}
STALE = ("_scale", "_scale_inv", "_packed", "_shape", "_global_scale", "input_scale")
KINDS = {
    "fp8": ("fp8", "FP8_BLOCK"),
    "pack-quantized": ("llm_compressor", "W8A16"),
    "pack-quantized-4": ("llm_compressor", "W4A16"),
    "int-quantized": ("llm_compressor", "INT8"),
    "float-quantized": ("llm_compressor", "FP8_STATIC"),
    "nvfp4": ("llm_compressor", "NVFP4"),
    "mxfp4": ("llm_compressor", "MXFP4"),
    "auto-round": ("auto_round", "W4A16"),
    "auto-round-fp8": ("auto_round", "FP8_BLOCK"),
    "gptq": ("auto_gptq", "W8A16"),
    "awq": ("auto_awq", "W4A16"),
}


def quantized(demo: Path, folder: Path, kind: str) -> Path:
    form, scheme = KINDS[kind]
    options = {"nsamples": 8, "seqlen": 32} if scheme in ("NVFP4", "FP8_STATIC") else {}
    job = AutoRound(demo, scheme=scheme, recipe="rtn", **options)
    return job.quantize_and_save(folder / "quantized", form).path


def floats(path: Path, folder: Path) -> Path:
    """Write the float model that a checkpoint stands for, and return its directory."""
    open_dequantized(open_checkpoint(path)).save_pretrained(folder / "floats")
    load_tokenizer(path).save_pretrained(folder / "floats")
    return folder / "floats"


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_source_gives_what_its_floats_give(demo_model, tmp_path, kind) -> None:
    source = quantized(demo_model, tmp_path, kind)
    dense = floats(source, tmp_path)
    one = AutoRound(source, **RTN).quantize_and_save(tmp_path / "one").path
    two = AutoRound(dense, **RTN).quantize_and_save(tmp_path / "two").path
    assert verify(one).ok
    tensors, wanted = (load_file(path / "model.safetensors") for path in (one, two))
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        # readers of gptq and awq compute in float16, while the files keep the rest as it was
        dense = name.endswith("norm.weight") or name == "model.embed_tokens.weight"
        assert torch.equal(tensor.to(wanted[name].dtype) if dense else tensor, wanted[name]), name
    assert not [name for name in tensors if name.endswith(STALE)]
    assert tensors["model.layers.1.self_attn.q_proj.weight"].dtype.itemsize == 2
    config = json.loads((one / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "auto-round"
    assert config["quantization_config"]["bits"] == 4


@pytest.mark.parametrize("low", [True, False], ids=["streamed", "whole"])
def test_tuning_on_an_fp8_source_is_tuning_on_its_floats(demo_model, tmp_path, low) -> None:
    source = quantized(demo_model, tmp_path, "fp8")
    dense = floats(source, tmp_path)
    one = AutoRound(source, low_cpu_mem_usage=low, **QUICK).quantize_and_save(tmp_path / "one")
    two = AutoRound(dense, **QUICK).quantize_and_save(tmp_path / "two")
    files = [made.path / "model.safetensors" for made in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_floats_of_an_fp8_source_are_written_as_floats(demo_model, tmp_path) -> None:
    source = quantized(demo_model, tmp_path, "fp8")
    job = AutoRound(source, **RTN)
    path = job.quantize_and_save(tmp_path / "one", "fake").path
    config = json.loads((path / "config.json").read_text())
    assert "quantization_config" not in config
    types = {t.dtype for t in load_file(path / "model.safetensors").values()}
    assert types == {torch.bfloat16}


def test_a_damaged_quantized_source_is_refused_before_work(demo_model, tmp_path) -> None:
    source = quantized(demo_model, tmp_path, "fp8")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = "large"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArError, match=r"already quantized \(quant_method fp8\).*weight_block_size"):
        AutoRound(source, **RTN)


def test_a_resumed_run_knows_its_quantized_source(demo_model, tmp_path) -> None:
    source = quantized(demo_model, tmp_path, "gptq")

    class Stop(RuntimeError):
        pass

    def stop(event) -> None:
        if event.kind == "block_started" and event.index == 2:
            raise Stop

    with pytest.raises(Stop):
        AutoRound(source, on_event=stop, **QUICK).quantize_and_save(tmp_path / "out")
    done = AutoRound(source, resume=True, **QUICK).quantize_and_save(tmp_path / "out")
    whole = AutoRound(source, **QUICK).quantize_and_save(tmp_path / "whole")
    files = [made.path / "model.safetensors" for made in (done, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
