"""Families whose vision part llama.cpp knows: tower, projector type, and what it must be told."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ar_export.errors import ExportError
from ar_export.gguf.metadata import first
from ar_export.gguf.mmproj import towers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ar_export.gguf.mmproj.towers import Tower
    from ar_schemes import LayerPlan

    Facts = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]

BREAK = "[IMG_BREAK]"
_QWEN_IMAGE = 560
"""Side of the image that graphs of Qwen's towers are sized for; they take any."""


@dataclass(frozen=True)
class Family:
    """Facts of one family.

    Attributes:
        projector: `clip.projector_type`.
        tower: names of its tensors.
        facts: further keys, of the configuration with all defaults and of the processor's.
    """

    projector: str
    tower: Tower
    facts: Facts


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family of a model that sees, None for one that does not.

    Args:
        config: the model's configuration with all defaults.

    Raises:
        ExportError: llama.cpp has no projector for it, or none that is written for here.
    """
    if not isinstance(config.get("vision_config"), dict):
        return None
    kind, eyes = str(config.get("model_type")), str(config["vision_config"].get("model_type"))
    found = FAMILIES.get(f"{kind}+{eyes}") or FAMILIES.get(kind)
    if found is None:
        known = ", ".join(sorted(FAMILIES))
        msg = (
            f"model type {kind!r} with a {eyes!r} tower sees, and no mmproj file can be written "
            f"for it. Known are {known}. Write another format, or the text model alone."
        )
        raise ExportError(msg)
    if kind != "qwen3_vl" or not config["vision_config"].get("deepstack_visual_indexes"):
        return found
    places = enumerate(config["vision_config"]["deepstack_visual_indexes"])
    stack = {
        f"deepstack_merger_list.{i}.{ours}": f"v.deepstack.{place}.{theirs}"
        for i, place in places
        for ours, theirs in (("norm", "norm"), ("linear_fc1", "fc1"), ("linear_fc2", "fc2"))
    }
    tower = dataclasses.replace(found.tower, top={**found.tower.top, **stack})
    return dataclasses.replace(found, tower=tower)


def check_eyes(config: Mapping[str, Any], plan: LayerPlan, source: Path | None) -> None:
    """Refuse a vision part that cannot be written, before work.

    Raises:
        ExportError: an unknown family, quantized layers in it, or no word of how images are
            prepared.
    """
    family = family_of(config)
    assert family is not None
    names = (row.layer.name for row in plan.quantized)
    bad = [n for n in names if family.tower.names_of(f"{n}.weight") is not None]
    if bad:
        msg = f"an mmproj file holds floats only, the plan quantizes {', '.join(bad[:4])}"
        raise ExportError(msg)
    if family.tower.permuted and (source is None or break_token(source) is None):
        msg = f"llama.cpp's Pixtral needs the token {BREAK}, and no tokenizer.json here has it"
        raise ExportError(msg)
    if source is not None:
        metadata(family, config, processor_settings(source), file_type=0)


def processor_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the image processor in a directory, from either file."""
    out: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            inner = found.get("image_processor")
            out |= found | (inner if isinstance(inner, dict) else {})
    return out


def break_token(folder: Path) -> int | None:
    """Return the number of the token `[IMG_BREAK]` of the tokenizer in a directory, or None."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens") or ()
    return next((int(t["id"]) for t in added if t.get("content") == BREAK), None)


def metadata(
    family: Family, config: Mapping[str, Any], processor: Mapping[str, Any], *, file_type: int
) -> dict[str, Any]:
    """Return all keys of the file and their values.

    Args:
        family: the family.
        config: the model's configuration with all defaults.
        processor: settings of the image processor.
        file_type: `general.file_type`.
    """
    vision, text = config["vision_config"], config["text_config"]
    lacking = [key for key in ("image_mean", "image_std") if key not in processor]
    if lacking:
        msg = (
            f"{' and '.join(lacking)} are neither in preprocessor_config.json nor in "
            "processor_config.json; llama.cpp cannot prepare images without them"
        )
        raise ExportError(msg)
    out: dict[str, Any] = {
        "general.type": "mmproj",
        "general.file_type": file_type,
        "clip.has_vision_encoder": True,
        "clip.projector_type": family.projector,
        "clip.vision.image_mean": [float(v) for v in processor["image_mean"]],
        "clip.vision.image_std": [float(v) for v in processor["image_std"]],
        "clip.vision.projection_dim": int(text["hidden_size"]),
        "clip.vision.patch_size": _side(vision["patch_size"]),
        "clip.vision.embedding_length": first(vision, "embed_dim", "hidden_size"),
        "clip.vision.attention.head_count": first(vision, "num_attention_heads", "num_heads"),
        "clip.vision.block_count": first(vision, "num_hidden_layers", "depth"),
    }
    inner = first(vision, "intermediate_size") or int(
        out["clip.vision.embedding_length"] * vision["mlp_ratio"]
    )
    out["clip.vision.feed_forward_length"] = int(inner)
    out["clip.vision.image_size"] = _side(vision.get("image_size") or _QWEN_IMAGE)
    own = {k: v for k, v in family.facts(config, processor).items() if v is not None}
    return out | own


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _eps(config: Mapping[str, Any], default: float) -> dict[str, Any]:
    value = config["vision_config"].get("layer_norm_eps", default)
    return {"clip.vision.attention.layer_norm_epsilon": float(value)}


def _activation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return which activation the tower has; none said is the quick GELU of CLIP."""
    name = str(config["vision_config"].get("hidden_act"))
    if name in ("quick_gelu", "None"):
        return {}
    return {"clip.use_silu" if name in ("silu", "swish") else "clip.use_gelu": True}


def _llava(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    if config["vision_config"].get("model_type") == "pixtral":
        return _pixtral(config, processor)
    chosen = config.get("vision_feature_layer", -2)
    if not isinstance(chosen, int) or config.get("vision_feature_select_strategy") == "full":
        msg = f"llama.cpp's llava takes one layer without the class token, not {chosen!r}"
        raise ExportError(msg)
    count = int(config["vision_config"]["num_hidden_layers"])
    layer = chosen if chosen >= 0 else count + chosen + 1
    return {
        **_eps(config, 1e-5),
        **_activation(config),
        "clip.has_llava_projector": True,
        "clip.vision.block_count": layer,
        "clip.vision.feature_layer": [layer],
    }


def _pixtral(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    merge = config.get("spatial_merge_size")
    return {
        **_eps(config, 1e-5),
        **_activation(config),
        "clip.vision.spatial_merge_size": None if merge is None else int(merge),
    }


def _gemma3(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    vision = config["vision_config"]
    side = math.isqrt(int(config.get("mm_tokens_per_image") or 256))
    factor = _side(vision["image_size"]) // _side(vision["patch_size"]) // side
    return {
        **_eps(config, 1e-6),
        "clip.use_gelu": True,
        "clip.vision.projector.scale_factor": factor,
    }


def _idefics3(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    size = (processor.get("size") or {}).get("longest_edge")
    return {
        **_eps(config, 1e-6),
        "clip.use_gelu": True,
        "clip.vision.projector.scale_factor": int(config.get("scale_factor", 2)),
        "clip.vision.preproc_image_size": int(size or _side(config["vision_config"]["image_size"])),
    }


def _internvl(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_eps(config, 1e-6),
        **_activation(config),
        "clip.vision.projector.scale_factor": int(1 / float(config.get("downsample_ratio", 0.5))),
        "clip.vision.preproc_min_tiles": processor.get("min_patches"),
        "clip.vision.preproc_max_tiles": processor.get("max_patches"),
    }


def _qwen2(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    return {
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.spatial_merge_size": int(config["vision_config"]["spatial_merge_size"]),
    }


def _qwen2_5(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    whole = [int(i) for i in config["vision_config"]["fullatt_block_indexes"]]
    step = whole[0] + 1
    if whole != list(range(step - 1, whole[-1] + 1, step)):
        msg = f"fullatt_block_indexes {whole} are not evenly spaced; llama.cpp knows no other order"
        raise ExportError(msg)
    return {
        **_qwen2(config, processor),
        "clip.use_silu": True,
        "clip.vision.n_wa_pattern": step,
        "clip.vision.window_size": int(config["vision_config"]["window_size"]),
    }


def _qwen3(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    vision = config["vision_config"]
    stacked = set(vision.get("deepstack_visual_indexes") or ())
    side = math.isqrt(int(vision["num_position_embeddings"])) * _side(vision["patch_size"])
    return {
        **_qwen2(config, processor),
        "clip.use_gelu": True,
        "clip.vision.image_size": side,
        "clip.vision.is_deepstack_layers": [i in stacked for i in range(int(vision["depth"]))],
    }


FAMILIES: dict[str, Family] = {
    "llava+clip_vision_model": Family("mlp", towers.CLIP, _llava),
    "llava+pixtral": Family("pixtral", towers.PIXTRAL, _pixtral),
    "mistral3": Family("pixtral", towers.PIXTRAL, _pixtral),
    "gemma3": Family("gemma3", towers.SIGLIP_GEMMA, _gemma3),
    "idefics3": Family("idefics3", towers.IDEFICS, _idefics3),
    "smolvlm": Family("idefics3", towers.IDEFICS, _idefics3),
    "internvl": Family("internvl", towers.INTERN, _internvl),
    "qwen2_vl": Family("qwen2vl_merger", towers.QWEN2, _qwen2),
    "qwen2_5_vl": Family("qwen2.5vl_merger", towers.QWEN2, _qwen2_5),
    "qwen3_vl": Family("qwen3vl_merger", towers.QWEN3, _qwen3),
}
"""Model type, with its tower's where that makes a difference, to its facts."""
