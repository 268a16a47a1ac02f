"""Families whose checkpoints name layers otherwise than Transformers' modules do.

What is written bears the names of the source: engines know no others, and rules of a config that
are meant for one layer must find it there.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ar_export import open_checkpoint, verify
from ar_export.lint.skips import says_quantized
from ar_tuner import AutoRound
from ar_tuner.testing import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from ar_export.verify import VerifyReport

ROWS = [torch.arange(16)[None] + 20]
RTN: dict[str, Any] = {"scheme": "W4A16G32", "recipe": "rtn", "nsamples": 1, "seqlen": 16}
FORMATS = ("auto_round", "auto_gptq", "llm_compressor")
FAMILIES = {
    "nemotron_h": "backbone.layers.1.mixer.shared_experts.down_proj",
    "phimoe": "model.layers.0.block_sparse_moe.gate",
    "kimi_linear": "model.layers.0.self_attn.f_a_proj",
    "bailing_hybrid": "model.layers.0.attention.q_proj",
    "deepseek_v4": "head",
    "gpt_neox": "embed_out",
    "hy_v3": "model.layers.1.mlp.shared_mlp.gate_proj",
    "inkling2_text": "model.llm.layers.0.attn.wq_du",
    "laguna": "model.layers.1.mlp.shared_expert.gate_proj",
    "llava": "language_model.model.layers.0.self_attn.q_proj",
    "qwen2_5_vl": "visual.blocks.0.attn.qkv",
    "mllama": "language_model.model.layers.0.self_attn.q_proj",
}
"""A layer of each that has another name in the model."""
EVERY = [(f, form) for f in ("nemotron_h", "phimoe", "kimi_linear") for form in FORMATS]
CASES = [*EVERY, *((f, FORMATS[i % 3]) for i, f in enumerate(list(FAMILIES)[3:]))]


def saved(family: str, folder: Path) -> Path:
    tiny_model(family).save_pretrained(folder)
    return folder


def quantized(source: Any, out: Path, form: str) -> tuple[Path, VerifyReport]:
    """Return the checkpoint made of a model, and what `verify` says of it."""
    reports = []

    def check(path, find, model) -> None:
        reports.append(verify(path, expected=find, against=model))

    job = AutoRound(source, dataset=ROWS, **RTN)
    path = job.quantize_and_save(out, form, check=check).path
    return path, reports[0]


def float_names(path: Path) -> set[str]:
    """Return the names that the tensors of a checkpoint would have as floats."""
    found = open_checkpoint(path)
    mine = {f"{layer}." for layer in found.quantized}
    plain = {n for n in found.names if f"{n.rpartition('.')[0]}." not in mine or n.endswith("bias")}
    return plain | {f"{layer}.weight" for layer in found.quantized}


@pytest.mark.parametrize(("family", "form"), CASES, ids=[f"{f}-{form}" for f, form in CASES])
def test_what_is_written_bears_the_names_of_the_checkpoint(family, form, tmp_path) -> None:
    source = saved(family, tmp_path / "source")
    names = set(open_checkpoint(source).names)
    assert f"{FAMILIES[family]}.weight" in names
    path, report = quantized(source, tmp_path / "out", form)
    assert report.ok, report.findings
    assert report.layers == report.compared > 0
    assert [f for f in report.findings if f.level == "warning"] == []
    split = {
        n for n in names if ".mlp.experts." in n and n.endswith(("_proj", "13_weight", "w2_weight"))
    }
    ours = float_names(path)
    assert names - ours <= split  # experts that only the files hold fused are written one by one
    assert all(".experts." in n for n in ours - names)


@pytest.mark.parametrize("form", FORMATS)
def test_a_config_means_layers_by_their_names_in_the_files(form, tmp_path) -> None:
    source = saved("nemotron_h", tmp_path / "source")
    path, _ = quantized(source, tmp_path / "out", form)
    found = open_checkpoint(path)
    floats = [n.removesuffix(".weight") for n in found.names if n.endswith("proj.weight")]
    assert floats
    assert says_quantized(found, floats) == {}
    text = json.dumps(json.loads((path / "config.json").read_text())["quantization_config"])
    assert "model.layers" not in text.replace("\\", "")
    assert "backbone" in text


def test_a_model_in_memory_is_written_under_the_names_of_files(tmp_path) -> None:
    model = tiny_model("nemotron_h").eval()
    model.save_pretrained(tmp_path / "source")
    path, report = quantized(model, tmp_path / "out", "auto_round")
    assert report.ok, report.findings
    assert float_names(path) == set(open_checkpoint(tmp_path / "source").names)


def test_a_weight_that_is_cut_from_one_of_the_files_is_written_in_parts(tmp_path) -> None:
    source = saved("hrm_text", tmp_path / "source")
    path, report = quantized(source, tmp_path / "out", "auto_round")
    assert report.ok, report.findings
    names = open_checkpoint(path).names
    assert any("L_module.layers.0.self_attn.q_proj.qweight" in name for name in names)


def test_a_linear_layer_by_class_only_stays_as_it_is(tmp_path) -> None:
    source = saved("deepseek_v4", tmp_path / "source")
    rows = [r for r in AutoRound(source, **RTN).plan().rows if "o_a_proj" in r.layer.name]
    assert rows
    assert all("multiplies in a way of its own" in r.reason for r in rows)
    falcon = AutoRound(saved("falcon", tmp_path / "falcon"), **RTN).plan()
    assert sum(r.quantized for r in falcon.rows) >= 4 * 2  # its linear layers have a forward, too


def test_a_plan_keeps_everything_but_names() -> None:
    from ar_schemes import LayerInfo, LayerRules, make_plan
    from ar_schemes import scheme as preset
    from ar_tuner.renaming import plan_in_files
    from ar_tuner.wiring import Piece, Wiring

    layers = [
        LayerInfo("model.layers.0.a", 64, 64, "model.layers.0"),
        LayerInfo("model.layers.0.b", 64, 64, "model.layers.0", role="experts"),
        LayerInfo("mtp.0.c", 64, 64, "mtp.0", keep="beyond the model"),
    ]
    plan = make_plan(layers, LayerRules(scheme=preset("W4A16G32")))
    names = {"model.layers.0.a": "h.0.x.a", "model.layers.0.b": "h.0.y.b"}
    pieces = {f"{k}.weight": Piece((f"{k}.weight",), (f"{v}.weight",)) for k, v in names.items()}
    renamed = plan_in_files(plan, Wiring(pieces, (), frozenset()))
    assert [r.layer.name for r in renamed.rows] == ["h.0.x.a", "h.0.y.b", "mtp.0.c"]
    assert [r.layer.block for r in renamed.rows] == ["h.0", "h.0", "mtp.0"]
    for before, after in zip(plan.rows, renamed.rows, strict=True):
        same = dataclasses.replace(after.layer, name=before.layer.name, block=before.layer.block)
        assert dataclasses.replace(after, layer=same) == before
