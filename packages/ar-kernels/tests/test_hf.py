"""Checkpoints written by hand, as auto-round 0.16.1 writes them, opened by transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ar_kernels import KernelError, QuantLinear, data_type, layout
from ar_kernels.hf import ask_for
from ar_kernels.hf.head import ENV, RoundedHead
from ar_kernels.native import library
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
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
    "lm_head": False,
}
NATIVE = pytest.mark.skipif(library.missing() is not None, reason="no native library")
IDS = torch.arange(24).reshape(2, 12)


def model_of(kind: str, *, tied: bool) -> nn.Module:
    """Return a random model in float32; the llama has biases."""
    torch.manual_seed(0)
    if kind == "qwen3":
        config = transformers.Qwen3Config(**SIZES, tie_word_embeddings=tied)
    else:
        config = transformers.LlamaConfig(
            **SIZES, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True
        )
    made = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return made.eval()


def write(
    folder: Path,
    config: dict[str, Any],
    *,
    kind: str = "qwen3",
    tied: bool = False,
    bit_order: str = "gptq",
    schemes: dict[str, dict[str, Any] | None] | None = None,
    asymmetric: bool = False,
) -> nn.Module:
    """Write a checkpoint; return the float32 model that holds its dequantized weights.

    `schemes`: end of a layer's name to what differs from `config`, None to leave it dense. The
    head is quantized only when named.
    """
    model = model_of(kind, tied=tied)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    if tied:
        del tensors["lm_head.weight"]
    schemes = {"lm_head": None, **(schemes or {})}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        change = next((v for k, v in schemes.items() if name.endswith(k)), {})
        if change is None:
            continue
        flat = {k: v for k, v in config.items() if k in W4} | change
        spec = scheme_from_dict({**flat, "sym": not asymmetric}).weight
        numbers = data_type("int")
        found = numbers.quantize(
            module.weight.data, spec, numbers.parameters(module.weight.data, spec)
        )
        packed = layout(bit_order).pack(found)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
        del tensors[f"{name}.weight"]
        module.weight.data = found.dequantize()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    saved = {**model.config.to_dict(), "dtype": "bfloat16", "quantization_config": config}
    saved["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(saved))
    return model


def opened(folder: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def quantized(model: nn.Module) -> dict[str, QuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def assert_same_logits(mine: nn.Module, reference: nn.Module) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(mine(IDS).logits, reference(IDS).logits)


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
    tmp_path, config, bit_order, asymmetric, kind
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


def test_names_and_patterns_of_extra_config_decide_layer_by_layer(tmp_path) -> None:
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


def test_a_tied_head_named_in_the_config_stays_tied(tmp_path) -> None:
    config = AUTO_ROUND | {"extra_config": {"lm_head": {"bits": 8}}}
    reference = write(tmp_path, config, tied=True)
    mine = opened(tmp_path, dtype=torch.float32)
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    assert_same_logits(mine, reference)


def test_a_layer_with_a_float_weight_in_the_file_stays_float(tmp_path) -> None:
    reference = write(tmp_path, AUTO_ROUND, schemes={"up_proj": None})
    mine = opened(tmp_path, dtype=torch.float32)
    assert len(quantized(mine)) == 12
    assert_same_logits(mine, reference)


def test_the_body_alone_opens_from_a_checkpoint_with_a_head(tmp_path) -> None:
    reference = write(tmp_path, AUTO_ROUND)
    body = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(quantized(body)) == 14
    with torch.inference_mode():
        torch.testing.assert_close(
            body(IDS).last_hidden_state, reference.model(IDS).last_hidden_state
        )


def test_a_state_dict_without_files_is_opened_by_the_config(tmp_path) -> None:
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
def test_the_asked_type_is_that_of_the_computation(tmp_path, asked, expected) -> None:
    write(tmp_path, AUTO_ROUND)
    mine = opened(tmp_path, dtype=asked)
    layer = mine.model.layers[0].mlp.up_proj
    assert (layer.dtype, layer.scales.dtype) == (expected, torch.float16)
    assert mine(IDS).logits.dtype is expected


@pytest.mark.parametrize("config", [AUTO_ROUND, GPTQ], ids=["auto-round", "gptq"])
def test_saving_writes_the_same_tensors_and_config(tmp_path, config) -> None:
    config = config | {"backend": "a-kernel-of-the-writer"}
    order = "gptq" if config["quant_method"] == "auto-round" else "gptq_g_idx"
    write(tmp_path / "a", config, kind="llama", bit_order=order)
    mine = opened(tmp_path / "a", dtype=torch.float32)
    mine(IDS)
    mine.save_pretrained(tmp_path / "b")
    first = safetensors.load_file(tmp_path / "a" / "model.safetensors")
    second = safetensors.load_file(tmp_path / "b" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(first[key].dtype is second[key].dtype for key in first)
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert saved["quantization_config"] == config
    assert_same_logits(opened(tmp_path / "b", dtype=torch.float32), mine)


def test_it_generates(tmp_path) -> None:
    reference = write(tmp_path, AUTO_ROUND)
    mine = opened(tmp_path, dtype=torch.float32)
    if library.missing() is None:  # norms of two blocks, their queries and keys, the last; the head
        kinds = [type(m).__name__ for m in mine.modules()]
        assert [kinds.count(kind) for kind in ("NativeNorm", "NativeLinear")] == [9, 1]
        assert mine.config._attn_implementation == "ar_native"
    out = [m.generate(IDS[:1], max_new_tokens=6, do_sample=False) for m in (mine, reference)]
    assert torch.equal(*out)


def test_the_whole_model_compiles_in_one_graph(tmp_path) -> None:
    write(tmp_path, AUTO_ROUND)
    mine = opened(tmp_path, dtype=torch.float32)
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        logits = compiled(IDS, use_cache=False).logits
        torch.testing.assert_close(logits, mine(IDS).logits)


def test_dequantize_gives_back_a_float_model(tmp_path) -> None:
    reference = write(tmp_path, AUTO_ROUND, kind="llama")
    mine = opened(tmp_path, dtype=torch.float32)
    mine.dequantize()
    assert not quantized(mine)
    assert not hasattr(mine.config, "quantization_config")
    assert_same_logits(mine, reference)


def test_ar_backend_and_the_user_s_config_choose_the_backend(tmp_path, monkeypatch) -> None:
    write(tmp_path, AUTO_ROUND)
    monkeypatch.setenv("AR_BACKEND", "reference")
    assert {m.backend for m in quantized(opened(tmp_path)).values()} == {"reference"}
    asked = transformers.AutoRoundConfig(backend="dense")
    with pytest.warns(UserWarning, match="loading attributes"):
        mine = opened(tmp_path, quantization_config=asked)
    assert {m.backend for m in quantized(mine).values()} == {"dense"}
    monkeypatch.setenv("AR_BACKEND", "refrence")
    with pytest.raises(KernelError, match=r"unknown backend 'refrence'\. Did you mean reference"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing_format": "auto_round:mlx9"}, r"unknown packing_format .*auto_round:auto_gptq"),
        ({"data_type": "mx_fp", "act_bits": 4}, r"14 layers .*weight_packed of mx_fp4 .* nothing"),
        ({"act_bits": 4, "act_data_type": "nosuch"}, "cannot be opened.*'nosuch' of the activat"),
        ({"act_bits": 1}, "cannot be opened.*activations: int has 2 to 8 bits"),
        ({"act_bits": 8, "act_group_size": 48}, "14 layers.*group48 do not divide 64"),
        ({"act_bits": 8, "act_dynamic": False}, "14 layers.*static, but the files hold no range"),
        ({"bits": 8}, r"14 layers of .*qweight of int8 group32 must have shape"),
        ({"group_size": 64}, "14 layers"),
        ({"group_size": [128, 128], "data_type": "nosuch"}, "data type 'nosuch' is not known"),
        ({"extra_config": {"q_proj": {"bits": 16}}}, r"2 layers .*16 bit, the files hold packed"),
    ],
    ids=[
        "packing",
        "data-type",
        "act-type",
        "act-bits",
        "act-group",
        "act-range",
        "bits",
        "group-size",
        "tile",
        "float-but-packed",
    ],
)  # fmt: skip
def test_a_checkpoint_we_cannot_open_is_refused_with_the_reason(tmp_path, change, message) -> None:
    write(tmp_path, AUTO_ROUND)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(KernelError, match=f"(?s){message}"):
        opened(tmp_path)


def test_a_lost_tensor_is_found_before_loading(tmp_path) -> None:
    write(tmp_path, AUTO_ROUND)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KernelError, match=r"layers\.1\.mlp\.up_proj: scales .* hold nothing"):
        opened(tmp_path)


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
def test_experts_packed_one_by_one_open_in_a_model_that_fuses_them(tmp_path, kind) -> None:
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


def test_experts_left_in_16_bit_stay_so_beside_packed_ones(tmp_path) -> None:
    reference = write_experts(tmp_path, "qwen3_moe", dense="layers.0.")
    mine = opened(tmp_path, dtype=torch.float32)
    assert {name.split(".experts.")[0] for name in quantized(mine)} == {"model.layers.1.mlp"}
    assert_same_logits(mine, reference)


def test_a_lost_expert_is_found_before_loading(tmp_path) -> None:
    write_experts(tmp_path, "qwen3_moe")
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    tensors = {k: v for k, v in tensors.items() if ".layers.1.mlp.experts.2." not in k}
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KernelError, match="files lack 3 weights of experts"):
        opened(tmp_path)


def test_float_models_are_not_quantized_while_loading(tmp_path) -> None:
    model_of("qwen3", tied=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        opened(tmp_path, quantization_config=transformers.AutoRoundConfig())


@NATIVE
def test_only_who_asks_gets_one(tmp_path, monkeypatch) -> None:
    reference = write(tmp_path, GPTQ, tied=True)
    plain = opened(tmp_path, dtype=torch.float32)
    assert not isinstance(plain.lm_head, RoundedHead)
    asked = opened(
        tmp_path, dtype=torch.float32, quantization_config=ask_for(method="gptq", head_bits=8)
    )
    assert isinstance(asked.lm_head, RoundedHead)
    assert asked.lm_head.weight is asked.model.embed_tokens.weight
    with torch.no_grad():
        logits, expected = asked(IDS).logits, reference(IDS).logits
    assert 1e-4 < (logits - expected).norm() / expected.norm() < 1e-2
    monkeypatch.setenv(ENV, "4")
    assert opened(tmp_path, dtype=torch.float32).lm_head.bits == 4
    monkeypatch.setenv(ENV, "four")
    with pytest.raises(KernelError, match="is no number of bits"):
        opened(tmp_path, dtype=torch.float32)


@NATIVE
@pytest.mark.parametrize("tied", [True, False])
def test_the_checkpoint_s_head_is_saved(tmp_path, tied: bool) -> None:
    write(tmp_path / "a", AUTO_ROUND, tied=tied)
    asked = opened(tmp_path / "a", dtype=torch.float32, quantization_config=ask_for(head_bits=4))
    asked.save_pretrained(tmp_path / "b")
    with torch.no_grad():
        logits, again = (opened(tmp_path / name, dtype=torch.float32)(IDS).logits for name in "ab")
    assert torch.equal(logits, again)
