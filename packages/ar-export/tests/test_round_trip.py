from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from ar_export import open_checkpoint, verify
from ar_kernels import equal


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("spelling", ["auto_round", "auto_round:gptqmodel"])
def test_what_was_put_comes_back_to_the_bit(make, bits, sym, spelling) -> None:
    path, weights = make(f"W{bits}A16", rules={"sym": sym}, format=spelling)
    found = open_checkpoint(path)
    assert set(found.quantized) == set(weights)
    for name, weight in weights.items():
        assert equal(found.weight(name), weight)
    report = verify(path, expected=weights)
    assert report.ok, report.findings
    assert report.compared == len(weights)


def test_mixed_widths_skipped_layers_and_a_head_are_said_in_the_config(make) -> None:
    rules = {
        "layer_config": {"down_proj": {"bits": 8}, "q_proj": "BF16"},
        "quant_lm_head": True,
    }
    path, weights = make(rules=rules)
    extra = open_checkpoint(path).quantization_config["extra_config"]
    assert extra["model.layers.0.q_proj"] == {"bits": 16, "data_type": "fp"}
    assert extra["model.layers.0.down_proj"] == {"bits": 8}
    assert extra["lm_head"] == {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
    assert verify(path, expected=weights).ok


@pytest.mark.parametrize(
    ("spelling", "sym", "packing"),
    [
        ("auto_round", True, "auto_round:auto_gptq"),
        ("auto_round", False, "auto_round:auto_awq"),
        ("auto_round:auto_gptq", True, "auto_round:auto_gptq"),
        ("auto_round:gptqmodel", True, "auto_round:gptqmodel"),
    ],
)
def test_a_spelling_resolves_to_a_packing(make, spelling, sym, packing) -> None:
    path, _ = make(rules={"sym": sym}, format=spelling)
    found = open_checkpoint(path)
    assert found.quantization_config["packing_format"] == packing
    assert ("model.layers.0.q_proj.g_idx" in found.names) == (spelling == "auto_round:gptqmodel")


def test_the_config_is_what_readers_look_for(make) -> None:
    path, _ = make()
    config = json.loads((path / "config.json").read_text())
    side = json.loads((path / "quantization_config.json").read_text())
    assert config["quantization_config"] == side
    assert config["dtype"] == "bfloat16"
    assert side["quant_method"] == "auto-round"
    assert side["block_name_to_quantize"] == "model.layers"
    assert side["iters"] == 3
    assert "lr" not in side


def test_fake_holds_the_dequantized_weights(make) -> None:
    path, weights = make(format="fake")
    found = open_checkpoint(path)
    assert found.format == "float"
    assert found.quantized == {}
    for name, weight in weights.items():
        stored = found.tensor(f"{name}.weight")
        assert torch.equal(stored, weight.dequantize(torch.bfloat16))
    assert "quantization_config" not in found.config


def test_equal_weights_give_equal_bytes_and_aligned_tensors(make) -> None:
    first, _ = make(folder="a")
    second, _ = make(folder="b")
    name = "model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    with safe_open(first / name, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_bounded_and_indexed(make) -> None:
    path, weights = make(max_shard_bytes=3000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert {p.name for p in path.glob("*.safetensors")} == files
    assert all(n.endswith(f"-of-{len(files):05d}.safetensors") for n in files)
    assert verify(path, expected=weights).ok


@pytest.mark.parametrize("spelling", ["auto_round", "auto_round:gptqmodel"])
def test_layers_with_and_without_zero_points_share_one_convention(make, spelling) -> None:
    path, weights = make(format=spelling, rules={"layer_config": {"down_proj": {"sym": False}}})
    packing = open_checkpoint(path).quantization_config["packing_format"]
    assert packing == spelling  # version 2 zeros for all: version 1 cannot hold every zero point
    assert verify(path, expected=weights).ok
