"""Checkpoints written by hand, as auto-round 0.16.1 writes them, opened by transformers."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


AUTO_ROUND = {"quant_method": "auto-round"}
GPTQ = {"quant_method": "gptq"}
IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize(
    ("config", "bit_order", "asymmetric"),
    [
        (AUTO_ROUND, "gptq", False),
        (AUTO_ROUND | {"bits": 2}, "gptq", False),
        (AUTO_ROUND | {"bits": 3}, "gptq", False),
        (AUTO_ROUND | {"bits": 8, "group_size": -1}, "gptq", False),
        (AUTO_ROUND, "gptq_g_idx", False),
        (AUTO_ROUND | {"packing_format": "auto_round", "sym": False}, "gptq_v2", True),
        (AUTO_ROUND | {"packing_format": "auto_round:gptqmodel"}, "gptq_v2_g_idx", False),
        (GPTQ, "gptq_g_idx", False),
        (GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}, "gptq_v2_g_idx", True),
        (GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, "gptq_g_idx", False),
    ],
    ids=[
        "w4", "w2", "w3", "w8-channel", "w4-unasked-g_idx", "v2-asym", "gptqmodel",
        "gptq", "gptq_v2-asym", "gptq-members",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_logits_are_those_of_the_dequantized_model(
    tmp_path, config, bit_order, asymmetric, kind, write, opened, quantized, assert_same_logits
) -> None:
    schemes = None
    if "modules_in_block_to_quantize" in config:
        schemes = {"q_proj": {}, "": None}
    reference = write(
        tmp_path, config, kind=kind, bit_order=bit_order, asymmetric=asymmetric, schemes=schemes
    )
    mine = opened(tmp_path, dtype=torch.float32)
    assert len(quantized(mine)) == (14 if schemes is None else 2)
    assert_same_logits(mine, reference)


def test_names_and_patterns_of_extra_config_decide_layer_by_layer(
    tmp_path, write, opened, quantized, assert_same_logits
) -> None:
    extra = {
        "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64},
        ".*o_proj.*": {"bits": 16, "data_type": "fp"},
        "lm_head": {"bits": 8, "group_size": 32, "sym": True, "data_type": "int"},
    }
    reference = write(
        tmp_path,
        AUTO_ROUND | {"extra_config": extra},
        schemes={
            "layers.0.mlp.down_proj": {"bits": 8, "group_size": 64},
            "o_proj": None,
            "lm_head": {"bits": 8},
        },
    )
    mine = opened(tmp_path, dtype=torch.float32)
    found = {name: (m.spec.bits, m.spec.group_size) for name, m in quantized(mine).items()}
    assert found["model.layers.0.mlp.down_proj"] == (8, 64)
    assert found["lm_head"] == (8, 32)
    assert found["model.layers.1.mlp.down_proj"] == (4, 32)
    assert len(found) == 13
    assert_same_logits(mine, reference)


def test_a_tied_head_named_in_the_config_stays_tied(
    tmp_path, write, opened, assert_same_logits
) -> None:
    config = AUTO_ROUND | {"extra_config": {"lm_head": {"bits": 8}}}
    reference = write(tmp_path, config, tied=True)
    mine = opened(tmp_path, dtype=torch.float32)
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    assert_same_logits(mine, reference)


def test_a_layer_with_a_float_weight_in_the_file_stays_float(
    tmp_path, write, opened, quantized, assert_same_logits
) -> None:
    reference = write(tmp_path, AUTO_ROUND, schemes={"up_proj": None})
    mine = opened(tmp_path, dtype=torch.float32)
    assert len(quantized(mine)) == 12
    assert_same_logits(mine, reference)


def test_the_body_alone_opens_from_a_checkpoint_with_a_head(tmp_path, write, quantized) -> None:
    reference = write(tmp_path, AUTO_ROUND)
    body = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(quantized(body)) == 14
    with torch.inference_mode():
        torch.testing.assert_close(
            body(IDS).last_hidden_state, reference.model(IDS).last_hidden_state
        )


def test_a_state_dict_without_files_is_opened_by_the_config(
    tmp_path, write, quantized, assert_same_logits
) -> None:
    reference = write(tmp_path, AUTO_ROUND)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    mine = transformers.Qwen3ForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32
    )
    assert len(quantized(mine)) == 14
    assert_same_logits(mine, reference)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["auto", "float32", "bfloat16"],
)
def test_the_asked_type_is_that_of_the_computation(
    tmp_path, asked, expected, write, opened
) -> None:
    write(tmp_path, AUTO_ROUND)
    mine = opened(tmp_path, dtype=asked)
    layer = mine.model.layers[0].mlp.up_proj
    assert (layer.dtype, layer.scales.dtype) == (expected, torch.float16)
    assert mine(IDS).logits.dtype is expected
