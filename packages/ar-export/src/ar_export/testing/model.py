"""A model of a few hundred thousand weights that conformance tests write and read.

One Llama block with biases. Every width is a multiple of 256, which every preset divides.
"""

from __future__ import annotations

import functools
import json
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ar_kernels import QuantizedWeight, data_type
from ar_schemes import LayerInfo, LayerRules, make_plan, scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from ar_schemes import LayerPlan, PlanRow, TensorSpec

_WIDE, _INNER, _WORDS = 256, 512, 256
_BLOCK = "model.layers.0"

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": True,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": _WIDE,
    "intermediate_size": _INNER,
    "max_position_embeddings": 128,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": _WORDS,
}
"""The model's config.json."""

LAYERS = (
    LayerInfo("model.embed_tokens", _WORDS, _WIDE, None, role="embedding"),
    LayerInfo(f"{_BLOCK}.self_attn.q_proj", _WIDE, _WIDE, _BLOCK),
    LayerInfo(f"{_BLOCK}.self_attn.k_proj", _WIDE, _WIDE, _BLOCK),
    LayerInfo(f"{_BLOCK}.self_attn.v_proj", _WIDE, _WIDE, _BLOCK),
    LayerInfo(f"{_BLOCK}.self_attn.o_proj", _WIDE, _WIDE, _BLOCK),
    LayerInfo(f"{_BLOCK}.mlp.gate_proj", _INNER, _WIDE, _BLOCK),
    LayerInfo(f"{_BLOCK}.mlp.up_proj", _INNER, _WIDE, _BLOCK),
    LayerInfo(f"{_BLOCK}.mlp.down_proj", _WIDE, _INNER, _BLOCK),
    LayerInfo("lm_head", _WORDS, _WIDE, None, role="lm_head"),
)
"""Its linear layers and its embedding."""

SKIPPED = ("gate_proj", "up_proj")
"""What example plans keep in 16 bit: a pair that readers fuse."""
_FUSED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class ExampleRequest:
    """What the tuner asks a sink for, made by hand."""

    output: Path
    plan: LayerPlan
    format: str
    source: Path | None = None
    config: Mapping[str, Any] = field(default_factory=lambda: dict(CONFIG))
    blocks: tuple[str, ...] = ("model.layers",)
    facts: Mapping[str, Any] = field(default_factory=lambda: {"iters": 3, "lr": None})
    max_shard_bytes: int = 10**9
    side: Callable[[Path], None] | None = None
    overwrite: bool = False


def example_plan(preset: str, *, down_proj: str | None = None) -> LayerPlan:
    """Return a plan that quantizes attention and `down_proj` and keeps the rest in 16 bit.

    Args:
        preset: name of the scheme.
        down_proj: name of another scheme for that layer.
    """
    rules = {} if down_proj is None else {"down_proj": down_proj}
    return make_plan(LAYERS, LayerRules(scheme(preset), layer_config=rules, ignore_layers=SKIPPED))


def example_weights(plan: LayerPlan) -> dict[str, QuantizedWeight]:
    """Return a quantized weight for every layer that the plan quantizes, by name.

    Ranges that members of a fused layer have in common are found over all of them; static
    activation ranges are filled in.
    """
    return {row.layer.name: _with_input_range(row, _quantized(row)) for row in plan.quantized}


def float_tensors(plan: LayerPlan) -> dict[str, Tensor]:
    """Return the tensors that stay as they are, by name: kept layers, norms and biases."""
    kept = [row.layer for row in plan.rows if not row.quantized]
    out = {
        f"{layer.name}.weight": _floats(layer.name, layer.rows, layer.columns).bfloat16()
        for layer in kept
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
        out[f"{_BLOCK}.{name}.weight"] = torch.linspace(0.5, 1.5, _WIDE).bfloat16()
    out["model.norm.weight"] = torch.linspace(1.5, 0.5, _WIDE).bfloat16()
    for name in (*_FUSED, "o_proj"):
        out[f"{_BLOCK}.self_attn.{name}.bias"] = torch.linspace(-1, 1, _WIDE).bfloat16()
    return out


def write_model(folder: Path) -> Path:
    """Write the float model as a Transformers checkpoint and return its directory."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = float_tensors(example_plan("BF16"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


def _floats(name: str, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(rows, columns, generator=generator) * 0.05


def _quantized(row: PlanRow) -> QuantizedWeight:
    assert row.scheme.weight is not None
    return _codes(row.layer.name, row.layer.rows, row.layer.columns, row.scheme.weight)


@functools.lru_cache(maxsize=64)
def _codes(name: str, rows: int, columns: int, spec: TensorSpec) -> QuantizedWeight:
    """Return a weight; kept, as every format asks for the same ones."""
    kind = data_type(spec.data_type)
    weight = _floats(name, rows, columns)
    prefix, _, last = name.rpartition(".")
    in_common: dict[str, Any] = {}
    share = getattr(kind, "shared", None)
    if share is not None and last in _FUSED:
        members = [_floats(f"{prefix}.{one}", rows, columns) for one in _FUSED]
        in_common = {"shared": share(members, spec)}
    return kind.quantize(weight, spec, kind.parameters(weight, spec, **in_common))


def _with_input_range(row: PlanRow, weight: QuantizedWeight) -> QuantizedWeight:
    act = row.scheme.activation
    if act is None:
        return weight
    extra = dict(weight.extra)
    if act.data_type == "nv_fp4_with_static_gs":
        extra.setdefault("input_global_scale", torch.tensor([448.0]))
    elif not act.dynamic:
        extra.setdefault("input_scale", torch.tensor([0.015625]))
    return QuantizedWeight(weight.spec, weight.codes, weight.scale, weight.zero_point, extra)
