"""Layers of multi-token prediction: Transformers builds none of them, no file may lose them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from ar_export import open_checkpoint, verify
from ar_export.lint.skips import says_quantized
from ar_export.opening import open_dequantized
from ar_tuner import AutoRound
from ar_tuner.testing import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [torch.arange(16)[None] + 20]
FAMILIES = {"deepseek_v3": "layers", "glm4_moe": "layers", "qwen3_next": "mtp", "mellum": "mtp"}
"""Where the checkpoints of a family keep them: behind the last layer, or apart."""
FORMATS = ("auto_round", "auto_gptq", "auto_awq", "llm_compressor")


def with_mtp(family: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a small model with a layer more than it has; return it and that layer's tensors."""
    model = tiny_model(family)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    count, width = config["num_hidden_layers"], config["hidden_size"]
    last = f"model.layers.{count - 1}."
    begin = f"model.layers.{count}." if FAMILIES[family] == "layers" else "mtp.layers.0."
    extra = {begin + k.removeprefix(last): v for k, v in tensors.items() if k.startswith(last)}
    names = (
        {"eh_proj": "eh_proj", "enorm": "enorm", "hnorm": "hnorm", "norm": "shared_head.norm"}
        if FAMILIES[family] == "layers"
        else {"eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden"}
        | {"norm": "norm"}
    )
    head = begin if FAMILIES[family] == "layers" else "mtp."
    extra[f"{head}{names.pop('eh_proj')}.weight"] = torch.randn(width, 2 * width)
    extra |= {f"{head}{name}.weight": torch.ones(width) for name in names.values()}
    torch.manual_seed(1)
    extra = {k: torch.randn(v.shape).to(v.dtype) * 0.05 for k, v in extra.items()}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"num_nextn_predict_layers": 1, "num_mtp_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, extra


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMATS)
def test_no_tensor_of_the_further_layer_is_lost(family, form, tmp_path) -> None:
    source, extra = with_mtp(family, tmp_path / "source")
    job = AutoRound(source, scheme="W4A16G32", recipe="rtn", dataset=ROWS, nsamples=1, seqlen=16)
    matrices = [k.removesuffix(".weight") for k, v in extra.items() if v.ndim == 2]
    reasons = {job.plan()[name].reason for name in matrices}
    assert reasons == {"it is in the checkpoint but not in the model (copied as it is)"}
    path = job.quantize_and_save(tmp_path / "out", form).path
    found = open_checkpoint(path)
    for name, tensor in extra.items():
        assert torch.equal(found.tensor(name), tensor), name
    assert says_quantized(found, matrices) == {}
    report = verify(path)
    assert report.ok
    assert [f for f in report.findings if f.level == "warning"] == []


def test_transformers_drafts_with_the_further_layer_of_what_was_written(tmp_path) -> None:
    from transformers.modeling_layers import MtpModel

    source, extra = with_mtp("mellum", tmp_path / "source")
    job = AutoRound(source, scheme="W4A16G32", recipe="rtn", dataset=ROWS, nsamples=1, seqlen=16)
    path = job.quantize_and_save(tmp_path / "out").path
    model = open_dequantized(open_checkpoint(path), torch.float32)
    model.config.name_or_path = str(path)  # where the drafter looks for its layer
    drafter = MtpModel.from_pretrained(model)
    stored = {n: p for n, p in drafter.named_parameters() if n.startswith("layers.")}
    assert sum(p.numel() for p in stored.values()) == sum(t.numel() for t in extra.values())
    assert torch.equal(stored["layers.0.eh_proj.weight"], extra["mtp.fc.weight"])
