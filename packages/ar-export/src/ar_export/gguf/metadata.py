"""The metadata of a GGUF file: what a model's config.json says, under llama.cpp's keys."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ar_export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import gguf

    from ar_export.gguf.architectures import Architecture


def first(config: Mapping[str, Any], *names: str) -> Any:
    """Return the first of some keys that a config has a value for, or None."""
    return next((config[n] for n in names if config.get(n) is not None), None)


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope settings in one form, from either spelling of transformers."""
    found = dict(config.get("rope_parameters") or {})
    found = dict(found.get("full_attention") or found)
    scaling = config.get("rope_scaling") or {}
    found.update({k: v for k, v in scaling.items() if v is not None})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of attention heads and of key-value heads."""
    count = first(config, "num_attention_heads", "n_head")
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        return count, 1 if config.get("multi_query") else count
    return count, first(config, "num_key_value_heads", "num_kv_heads") or count


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the size of an attention head."""
    given = config.get("head_dim")
    width: int = first(config, "hidden_size", "n_embd")
    return int(given) if given else width // heads(config)[0]


def metadata(config: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """Return keys (after the prefix) and values for an architecture."""
    width = first(config, "hidden_size", "n_embd")
    count, shared = heads(config)
    settings = rope(config)
    inner = first(config, "intermediate_size", "n_inner", "ffn_hidden_size") or 4 * width
    eps = first(config, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    kind = "layer_norm_epsilon" if arch.layer_norm else "layer_norm_rms_epsilon"
    out: dict[str, Any] = {
        "block_count": first(config, "num_hidden_layers", "n_layer"),
        "context_length": first(config, "max_position_embeddings", "n_positions") or 2048,
        "embedding_length": width,
        "feed_forward_length": inner,
        "attention.head_count": count,
        "attention.head_count_kv": shared,
        f"attention.{kind}": float(eps if eps is not None else 1e-5),
        "vocab_size": config["vocab_size"],
    }
    if arch.name != "gpt2":
        partial = first(settings, "partial_rotary_factor")
        partial = first(config, "partial_rotary_factor") if partial is None else partial
        out["rope.freq_base"] = float(settings["rope_theta"])
        out["rope.dimension_count"] = int(head_dim(config) * (partial or 1.0))
    if config.get("head_dim"):
        out |= {
            "attention.key_length": head_dim(config),
            "attention.value_length": head_dim(config),
        }
    out |= _scaling(settings, config)
    experts = first(config, "num_local_experts", "num_experts")
    if experts:
        out |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
    if "mrope_section" in settings:  # height, width, time; four are wanted
        out["rope.dimension_sections"] = [*settings["mrope_section"], 0, 0, 0, 0][:4]
    if arch.name == "gemma3":
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        base = local.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0
        out["rope.freq_base_swa"] = float(base)
    if arch.name == "stablelm":
        out["use_parallel_residual"] = bool(config.get("use_parallel_residual", False))
    for key, name in arch.facts.items():
        value = config.get(name)
        if value is not None:
            out[key] = value
        elif arch.name == "phi3":
            out[key] = 0  # llama.cpp asks for it; none means no window
    return out


def _scaling(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    kind = settings["rope_type"]
    if kind in ("default", "llama3", "mrope"):
        return {}
    if kind not in ("linear", "yarn", "longrope"):
        msg = f"rope scaling {kind!r} cannot be written to GGUF: use linear, yarn, llama3, longrope"
        raise ExportError(msg)
    out: dict[str, Any] = {"rope.scaling.type": kind}
    if settings.get("factor") is not None:
        out["rope.scaling.factor"] = float(settings["factor"])
    original = settings.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    if original:
        out["rope.scaling.original_context_length"] = int(original)
    if kind == "longrope":
        short = float(original or config["max_position_embeddings"])
        longer = config["max_position_embeddings"] / short
        factor = 1.0 if longer <= 1 else math.sqrt(1 + math.log(longer) / math.log(short))
        out["rope.scaling.attn_factor"] = factor
    return out


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one value under a key, its GGUF type chosen by its Python type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def rope_factors(config: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return extra rope tensors by name: divisors of the frequencies (Llama 3, longrope)."""
    settings, half = rope(config), head_dim(config) // 2
    if settings["rope_type"] == "longrope":
        return {
            "rope_factors_long.weight": list(settings["long_factor"]),
            "rope_factors_short.weight": list(settings["short_factor"]),
        }
    if settings["rope_type"] != "llama3":
        return {}
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    original, factor = settings["original_max_position_embeddings"], settings["factor"]
    out = []
    for k in range(half):
        wave = 2 * math.pi * settings["rope_theta"] ** (k / half)
        smooth = (original / wave - low) / (high - low)
        if wave < original / high:
            out.append(1.0)
        elif wave > original / low:
            out.append(float(factor))
        else:
            out.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": out}
