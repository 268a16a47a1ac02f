"""Models that see, written in every format and opened again: logits, images included, are equal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from ar_export import open_checkpoint, verify
from ar_export.lint.skips import says_quantized
from ar_export.opening import open_dequantized, open_model
from ar_tuner import AutoRound
from ar_vlm import Inputs, read_samples
from ar_vlm.testing import make_tiny, write_samples

if TYPE_CHECKING:
    from pathlib import Path

FORMATS = ("auto_round", "auto_gptq", "auto_awq", "llm_compressor")
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "mllama", "internvl")
CASES = [(f, FORMATS[i % 4]) for i, f in enumerate(FAMILIES)] + [
    (f, form) for f in ("llava", "qwen2_5_vl") for form in FORMATS[1:]
]
PROCESSING = ("processor_config.json", "preprocessor_config.json", "chat_template.jinja")
WHERE = {
    "gptq": "dynamic",
    "awq": "modules_to_not_convert",
    "compressed-tensors": "ignore",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a small model of each family with its processor."""
    return {f: make_tiny(f, tmp_path_factory.mktemp(f) / "source") for f in FAMILIES}


@pytest.mark.parametrize(
    ("family", "form"), dict.fromkeys(CASES), ids=[f"{a}-{b}" for a, b in dict.fromkeys(CASES)]
)
def test_what_is_written_sees_what_was_tuned(family, form, sources, tmp_path) -> None:
    source = sources[family]
    reports = []

    def check(path, find, model) -> None:
        reports.append(verify(path, expected=find, against=model))

    job = AutoRound(source, scheme="W4A16G32", recipe="rtn")
    model, path = job.quantize_and_save(tmp_path / "out", form, check=check)
    assert reports[0].ok, reports[0].findings
    assert [f for f in reports[0].findings if f.level == "warning"] == []
    for name in PROCESSING:
        if (source / name).is_file():
            assert (path / name).read_bytes() == (source / name).read_bytes()
    before, after = (json.loads((p / "config.json").read_text()) for p in (source, path))
    assert after["text_config"] == before["text_config"]
    assert after["vision_config"] == before["vision_config"]
    assert "quantization_config" in after
    batch = Inputs.from_pretrained(path).build(read_samples(write_samples(tmp_path / "s", 1))[0])
    assert any("pixel" in name for name in batch)
    opened = open_model(path, torch.float32)
    with torch.inference_mode():
        wanted, got = model(**batch).logits, opened(**batch).logits
    assert torch.allclose(wanted, got, atol=1e-4 * float(wanted.abs().max()))
    with torch.inference_mode():
        blind = opened(input_ids=batch["input_ids"]).logits if family == "llava" else None
    assert blind is None or not torch.allclose(blind, got, atol=1e-3)


@pytest.mark.parametrize("form", FORMATS)
def test_towers_are_declared_under_the_names_in_the_files(form, sources, tmp_path) -> None:
    job = AutoRound(sources["llava"], scheme="W4A16G32", recipe="rtn")
    path = job.quantize_and_save(tmp_path / "out", form).path
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    found = open_checkpoint(path)
    tower = [n.removesuffix(".weight") for n in found.names if n.endswith("q_proj.weight")]
    assert tower
    assert all(name.startswith("vision_tower.") for name in tower)
    if form == "auto_round":  # only what lies in the lists of blocks is quantized
        assert config["block_name_to_quantize"] == "language_model.model.layers"
    else:
        assert "vision_tower" in json.dumps(config[WHERE[config["quant_method"]]])
    assert says_quantized(found, tower) == {}
    if form == "auto_awq":  # engines look for parts of names of layers they fuse
        assert "vision_tower" in config["modules_to_not_convert"]
        assert not any("vision_tower" in layer for layer in found.quantized)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_a_packed_source_that_sees_gives_what_its_floats_give(family, sources, tmp_path) -> None:
    first = AutoRound(sources[family], scheme="W8A16G32", recipe="rtn")
    source = first.quantize_and_save(tmp_path / "first", "llm_compressor").path
    dense = tmp_path / "floats"
    open_dequantized(open_checkpoint(source), torch.float32).save_pretrained(dense)
    made = []
    for name, given in (("one", source), ("two", dense)):
        job = AutoRound(given, scheme="W4A16G32", recipe="rtn", model_dtype="float32")
        made.append(open_checkpoint(job.quantize_and_save(tmp_path / name).path))
    assert set(made[0].quantized) == set(made[1].quantized)
    for layer in made[0].quantized:
        one, two = (found.weight(layer).dequantize() for found in made)
        assert torch.equal(one, two), layer
    assert not [n for n in made[0].names if n.endswith(("weight_scale_inv", "weight_packed"))]
    assert verify(made[0].path).ok
