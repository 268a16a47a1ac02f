"""Experts packed one by one, opened in models that fuse them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ar_kernels import KernelError, data_type, layout
from ar_schemes import scheme_from_dict

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

if TYPE_CHECKING:
    from pathlib import Path


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
W4 = {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    **W4,
    "iters": 0,
    "autoround_version": "0.16.1",
    "block_name_to_quantize": "model.layers",
}
MOE = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def moe_config(kind: str) -> Any:
    """Return the config of a small model with experts."""
    if kind == "mixtral":
        return transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    if kind == "deepseek_v3":
        ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16}
        heads = {"qk_nope_head_dim": 16, "v_head_dim": 32, "n_group": 2, "topk_group": 1}
        experts = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
        return transformers.DeepseekV3Config(**MOE | {"head_dim": 16} | ranks | heads | experts)
    return transformers.Qwen3MoeConfig(**MOE)


def write_experts(folder: Path, kind: str, *, dense: str = "nothing") -> nn.Module:
    """Write a checkpoint whose experts are packed one by one; return the float model."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(moe_config(kind)).eval()
    model.save_pretrained(folder)  # experts one by one, under the names of the architecture
    tensors = safetensors.load_file(folder / "model.safetensors")
    spec, numbers = scheme_from_dict(W4).weight, data_type("int")
    for key in [k for k in tensors if ".experts." in k and dense not in k]:
        weight = tensors.pop(key)
        found = numbers.quantize(weight, spec, numbers.parameters(weight, spec))
        packed = layout("gptq").pack(found)
        tensors |= {f"{key.removesuffix('weight')}{k}": v for k, v in packed.items()}
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = AUTO_ROUND | {"modules_in_block_to_quantize": None}
    (folder / "config.json").write_text(json.dumps(config))
    dequantized = {k: v for k, v in tensors.items() if not k.endswith(("qzeros", "scales"))}
    for key in [k for k in dequantized if k.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        parts = {k: tensors[f"{name}.{k}"] for k in ("qweight", "qzeros", "scales")}
        columns, rows = parts["qweight"].shape[0] * 8, parts["qweight"].shape[1]
        found = layout("gptq").unpack(parts, spec, rows, columns)
        dequantized[f"{name}.weight"] = found.dequantize()
        del dequantized[key]
    return (
        type(model)
        .from_pretrained(None, config=moe_config(kind), state_dict=dequantized, dtype=torch.float32)
        .eval()
    )


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_packed_one_by_one_open_in_a_model_that_fuses_them(
    tmp_path, kind, opened, quantized, assert_same_logits
) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping

    reference = write_experts(tmp_path / "a", kind)
    mine, report = opened(tmp_path / "a", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    experts = [name for name in quantized(mine) if ".experts." in name]
    assert len(experts) == 3 * 4 * (1 if kind == "deepseek_v3" else 2)
    assert_same_logits(mine, reference)
    mine.save_pretrained(tmp_path / "b")
    first, second = (safetensors.load_file(tmp_path / f / "model.safetensors") for f in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    # the tables of transformers still fuse the experts of other models
    kinds = {type(c).__name__ for c in get_model_conversion_mapping(reference)}
    assert "WeightConverter" in kinds
    assert not hasattr(type(reference.model.layers[1].mlp.experts), "_up")


def test_experts_left_in_16_bit_stay_so_beside_packed_ones(
    tmp_path, opened, quantized, assert_same_logits
) -> None:
    reference = write_experts(tmp_path, "qwen3_moe", dense="layers.0.")
    mine = opened(tmp_path, dtype=torch.float32)
    assert {name.split(".experts.")[0] for name in quantized(mine)} == {"model.layers.1.mlp"}
    assert_same_logits(mine, reference)


def test_a_lost_expert_is_found_before_loading(tmp_path, opened) -> None:
    write_experts(tmp_path, "qwen3_moe")
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    tensors = {k: v for k, v in tensors.items() if ".layers.1.mlp.experts.2." not in k}
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KernelError, match="files lack 3 weights of experts"):
        opened(tmp_path)
