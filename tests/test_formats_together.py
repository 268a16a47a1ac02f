"""Several formats from one run; layers the model does not have; scales of another type."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ar_export import open_checkpoint, open_dequantized, verify
from ar_kernels import equal
from ar_tuner import AutoRound, TunerError

RTN = {"recipe": "rtn"}


def test_two_formats_hold_the_same_weights(demo_model, tmp_path) -> None:
    job = AutoRound(demo_model, scheme="W4A16", **RTN)
    _, path = job.quantize_and_save(tmp_path / "out", "auto_round,auto_round:gptqmodel,fake")
    assert path == tmp_path / "out"
    folders = sorted(p.name for p in path.iterdir())
    assert folders == ["auto-round", "auto-round-gptqmodel", "fake"]
    one, two = (open_checkpoint(path / name) for name in folders[:2])
    assert one.quantized.keys() == two.quantized.keys()
    assert all(equal(one.weight(n), two.weight(n)) for n in one.quantized)
    assert all(verify(path / name).ok for name in folders)
    fake = load_file(path / "fake" / "model.safetensors")
    for name in one.quantized:
        stored = fake[f"{name}.weight"]
        assert torch.equal(one.weight(name).dequantize(stored.dtype), stored), name


@pytest.mark.parametrize("format", ["", "auto_round,auto_round", ",", []])
def test_no_format_or_one_twice_is_refused(format, demo_model, tmp_path) -> None:
    with pytest.raises(TunerError, match="format"):
        AutoRound(demo_model, **RTN).quantize_and_save(tmp_path / "out", format)


def test_one_impossible_format_of_several_stops_all_before_work(demo_model, tmp_path) -> None:
    job = AutoRound(demo_model, scheme="W4A16", sym=False, **RTN)
    with pytest.raises(Exception, match="symmetric"):
        job.quantize_and_save(tmp_path / "out", ["fake", "auto_round:auto_gptq"])
    assert not (tmp_path / "out").exists()


def test_layers_outside_the_model_are_copied_and_declared(demo_model, tmp_path) -> None:
    source = tmp_path / "source"
    shutil.copytree(demo_model, source)
    tensors = load_file(source / "model.safetensors")
    extra = torch.randn(64, 128).to(torch.bfloat16)
    tensors |= {"mtp.layers.0.eh_proj.weight": extra, "mtp.norm.weight": torch.ones(128)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    _, path = AutoRound(source, scheme="W4A16", **RTN).quantize_and_save(tmp_path / "out")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["extra_config"]["mtp.layers.0.eh_proj"] == {"bits": 16, "data_type": "fp"}
    assert "mtp" not in config["block_name_to_quantize"]
    found = open_checkpoint(path)
    assert torch.equal(found.tensor("mtp.layers.0.eh_proj.weight"), extra)
    assert "mtp.norm.weight" in found.names
    assert verify(path).ok


def test_a_checkpoint_opens_dequantized(demo_model, tmp_path) -> None:
    model, path = AutoRound(demo_model, scheme="W4A16", **RTN).quantize_and_save(tmp_path / "out")
    opened = open_dequantized(open_checkpoint(path))
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        assert torch.equal(opened(ids).logits, model(ids).logits)


def test_an_unknown_scale_type_is_refused(demo_model) -> None:
    with pytest.raises(TunerError, match="scale_dtype"):
        AutoRound(demo_model, scale_dtype="float8")
