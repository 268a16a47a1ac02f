"""FP8 checkpoints in tiles, as DeepSeek's are: experts, towers and further layers among them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ar_export import open_checkpoint, verify
from ar_export.lint.skips import says_quantized
from ar_tuner import AutoRound
from ar_tuner.testing import in_tiles, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

TILE = 128
FAMILIES = ("deepseek_v3", "qwen3_moe", "qwen3_vl")
_PROJECTION = re.compile(r"(self_attn|mlp)\..*_proj(_with_mqa|_[ab])?\.weight$|eh_proj\.weight$")
RTN: dict[str, Any] = {
    "scheme": "W4A16G32",
    "recipe": "rtn",
    "dataset": [torch.arange(16)[None] + 20],
    "nsamples": 1,
    "seqlen": 16,
}


def as_fp8(family: str, folder: Path) -> tuple[Path, Path, list[str]]:
    """Write a small model with a further layer, in FP8 and as the floats that stands for.

    Returns:
        the directory of either, and the names of the further layer's tensors.
    """
    fp8, floats = folder / "fp8", folder / "floats"
    tiny_model(family).save_pretrained(fp8)
    tensors = load_file(fp8 / "model.safetensors")
    config = json.loads((fp8 / "config.json").read_text())
    extra: dict[str, torch.Tensor] = {}
    if family != "qwen3_vl":
        count = config["num_hidden_layers"]
        last, new = f"model.layers.{count - 1}.", f"model.layers.{count}."
        extra = {
            new + k.removeprefix(last): tensors[k].clone() for k in tensors if k.startswith(last)
        }
        extra[f"{new}eh_proj.weight"] = torch.randn(
            config["hidden_size"], 2 * config["hidden_size"]
        )
    stored: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    for name, tensor in (tensors | extra).items():
        dense[name] = stored[name] = tensor.bfloat16() if tensor.ndim > 1 else tensor
        if _PROJECTION.search(name) and "visual" not in name:
            codes, scales = in_tiles(tensor.float())
            stored[name], stored[f"{name}_scale_inv"] = codes, scales
            spread = scales.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
            whole = codes.float() * spread[: tensor.shape[0], : tensor.shape[1]]
            dense[name] = whole.bfloat16()
    save_file(stored, fp8 / "model.safetensors", metadata={"format": "pt"})
    config["dtype"] = "bfloat16"
    floats.mkdir()
    (floats / "config.json").write_text(json.dumps(config))
    save_file(dense, floats / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [TILE, TILE],
    }
    (fp8 / "config.json").write_text(json.dumps(config))
    return fp8, floats, list(extra)


@pytest.mark.parametrize("low", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_fp8_source_gives_what_its_floats_give(family, low, tmp_path) -> None:
    fp8, floats, extra = as_fp8(family, tmp_path)
    made = []
    for name, source in (("one", fp8), ("two", floats)):
        job = AutoRound(source, low_cpu_mem_usage=low, **RTN)
        made.append(open_checkpoint(job.quantize_and_save(tmp_path / name).path))
    one, two = made
    assert set(one.names) == set(two.names)
    assert one.quantized
    for name in one.names:
        assert torch.equal(one.tensor(name), two.tensor(name)), name
    assert set(extra) <= set(one.names)
    assert {one.facts[name].dtype for name in extra} <= {torch.bfloat16, torch.float32}
    matrices = [n.removesuffix(".weight") for n in extra if len(one.facts[n].shape) > 1]
    assert says_quantized(one, matrices) == {}
    assert verify(one.path).ok


def test_layers_that_are_kept_of_an_fp8_source_are_written_as_floats(tmp_path) -> None:
    fp8, floats, _ = as_fp8("qwen3_moe", tmp_path)
    job = AutoRound(fp8, ignore_layers="self_attn", **RTN)
    found = open_checkpoint(job.quantize_and_save(tmp_path / "out", "llm_compressor").path)
    wanted = load_file(floats / "model.safetensors")
    kept = [n for n in found.names if "self_attn" in n and n.endswith("proj.weight")]
    assert kept
    for name in kept:
        assert torch.equal(found.tensor(name), wanted[name]), name
    assert not [n for n in found.names if n.endswith("scale_inv")]
