"""Verifying a checkpoint compares its layers with their inputs quantized, too."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from ar_export import open_checkpoint, open_model, verify
from ar_export.activations import check_activations
from ar_tuner import AutoRound

SMALL = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"max_position_embeddings": 64},
}
ROWS = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(1))


def written(tmp_path, scheme, form, *, experts=False):
    """Write a tiny checkpoint; return its directory and what verifying it said."""
    torch.manual_seed(0)
    sparse = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = t.Qwen3MoeConfig(**SMALL | sparse) if experts else t.Qwen3Config(**SMALL)
    t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "float")
    reports = []
    job = AutoRound(
        tmp_path / "float", scheme=scheme, recipe="rtn", dataset=ROWS, nsamples=8, seqlen=32
    )
    job.quantize_and_save(
        tmp_path / "out",
        form,
        check=lambda path, of, tuned: reports.append(verify(path, expected=of, against=tuned)),
    )
    return tmp_path / "out", reports[0]


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        ("MXFP4", "auto_round"),
        ("NVFP4", "auto_round"),
        ("FP8_STATIC", "auto_round"),
        ("NVFP4", "llm_compressor"),
        ("FP8_STATIC", "llm_compressor"),
        ("INT8_W8A8", "llm_compressor"),
    ],
)
def test_layers_with_quantized_inputs_are_compared(tmp_path, scheme, form) -> None:
    _, report = written(tmp_path, scheme, form)
    assert report.ok, report.findings
    assert report.activations == report.layers == 7
    assert report.logits is not None


def test_experts_too(tmp_path) -> None:
    _, report = written(tmp_path, "MXFP4", "auto_round", experts=True)
    assert report.ok, report.findings
    assert report.activations == report.layers == 4 + 4 * 3


def test_inputs_that_stay_in_16_bit_are_not_counted(tmp_path) -> None:
    _, report = written(tmp_path, "W4A16G32", "auto_round")
    assert report.ok
    assert report.activations == 0


def test_a_layer_that_quantizes_its_input_otherwise_is_found(tmp_path) -> None:
    path, _ = written(tmp_path, "FP8_STATIC", "llm_compressor")
    found, model = open_checkpoint(path), open_model(path)
    assert check_activations(found, model) == (7, [])
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.ready_static *= 0.3  # clamps
    other = model.get_submodule("model.layers.0.self_attn.q_proj")
    other.leave_activations()
    _, findings = check_activations(found, model)
    assert [f.where for f in findings] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    ]
    assert "opened as None" in findings[0].what
    assert "differ by" in findings[1].what
