"""gpt-oss as OpenAI published it: MXFP4 experts in one tensor; inspected, verified, converted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from ar_cli.main import run
from ar_export import ExportError, convert, open_checkpoint, verify
from ar_export.opening import open_model
from ar_kernels import data_type, layout
from ar_schemes import scheme
from ar_tuner.testing import tiny_model, tiny_rows

if TYPE_CHECKING:
    from pathlib import Path


def published(folder: Path) -> Path:
    """Write a small gpt-oss whose experts are stacked and packed."""
    model = tiny_model("gpt_oss")
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    spec, numbers = scheme("MXFP4").weight, data_type("mx_fp")
    assert spec is not None
    for key in [k for k in tensors if k.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        packed = []
        for stored in tensors.pop(key).float():
            weight = stored.t().contiguous()  # float files hold [I, O]
            found = numbers.quantize(weight, spec, numbers.parameters(weight, spec))
            packed.append(layout("ct_mxfp4").pack(found))
        codes = torch.stack([p["weight_packed"] for p in packed])
        tensors[f"{key}_blocks"] = codes.unflatten(-1, (-1, 16))
        tensors[f"{key}_scales"] = torch.stack([p["weight_scale"] for p in packed])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tiny_rows(2, 16), use_cache=False).logits


def test_every_expert_is_a_layer_and_the_file_is_sound(tmp_path, capsys) -> None:
    path = published(tmp_path / "oss")
    found = open_checkpoint(path)
    experts = found.config["num_local_experts"] * found.config["num_hidden_layers"]
    assert found.format == "mxfp4"
    assert len(found.quantized) == 3 * experts
    assert {e.layout for e in found.quantized.values()} == {"ct_mxfp4"}
    assert verify(path).ok
    assert run(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["scheme"].startswith("W4A16")


@pytest.mark.parametrize("form", ["llm_compressor", "fake"])
def test_what_it_is_converted_to_gives_the_same_logits(form, tmp_path) -> None:
    path = published(tmp_path / "oss")
    out = convert(path, tmp_path / "out", form)
    wanted = logits(open_model(path, torch.float32))
    torch.testing.assert_close(logits(open_model(out, torch.float32)), wanted, atol=2e-5, rtol=1e-4)
    assert verify(out).ok


def test_a_stack_of_another_shape_is_refused(tmp_path) -> None:
    path = published(tmp_path / "oss")
    tensors = load_file(path / "model.safetensors")
    key = next(k for k in tensors if k.endswith("_blocks"))
    tensors[key] = tensors[key].flatten(2).contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="not 4 dimensions"):
        open_checkpoint(path)
