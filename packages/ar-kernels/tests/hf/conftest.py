"""Checkpoints written by hand, as auto-round 0.16.1 writes them, for transformers to open."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ar_kernels import QuantLinear, data_type, layout
from ar_schemes import scheme_from_dict

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

if TYPE_CHECKING:
    from collections.abc import Callable
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
CONFIGS = {config["quant_method"]: config for config in (AUTO_ROUND, GPTQ)}
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

    `config`: its `quant_method`, and what differs from what that tool writes.
    `schemes`: end of a layer's name to what differs from `config`, None to leave it dense. The
    head is quantized only when named.
    """
    config = CONFIGS[config["quant_method"]] | config
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


@pytest.fixture(name="model_of")
def _model_of() -> Callable[..., Any]:
    return model_of


@pytest.fixture(name="write")
def _write() -> Callable[..., Any]:
    return write


@pytest.fixture(name="opened")
def _opened() -> Callable[..., Any]:
    return opened


@pytest.fixture(name="quantized")
def _quantized() -> Callable[..., Any]:
    return quantized


@pytest.fixture(name="assert_same_logits")
def _assert_same_logits() -> Callable[..., Any]:
    return assert_same_logits
