"""The text part of a model that sees: its configuration, and names as those of a text model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ar_export.gguf.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXT = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?")
WRAPPER = "ar.source."
"""Begin of the keys that say what stands for `model` and `lm_head` in the checkpoint."""
BODY, HEAD = "model", "lm_head"
"""What the names of a text model begin with."""


def sees(config: Mapping[str, Any]) -> bool:
    """Tell whether a configuration is that of a model with a vision part."""
    return isinstance(config.get("vision_config"), dict)


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with all defaults, which files leave out."""
    from transformers import AutoConfig

    settings = {k: v for k, v in config.items() if k != "quantization_config"}
    made: dict[str, Any] = AutoConfig.for_model(**settings).to_dict()
    return made


def text_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the text model in a model that sees; others as they are."""
    if not sees(config):
        return dict(config)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    whole = described(config)
    text: dict[str, Any] = dict(whole["text_config"])
    own = [name for name in config.get("architectures") or () if name in ARCHITECTURES]
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(text.get("model_type")))
    text["architectures"] = own or ([named] if named else list(config.get("architectures") or ()))
    text["tie_word_embeddings"] = bool(whole.get("tie_word_embeddings"))
    text["n_deepstack_layers"] = len(whole["vision_config"].get("deepstack_visual_indexes") or ())
    return text


def text_key(key: str) -> str:
    """Return the name of a tensor as that of a text model, whatever its wrapper calls it."""
    found = _TEXT.match(key)
    if found is None:
        return key
    inside = key[found.end() :]
    return inside if inside.startswith(f"{HEAD}.") else f"{BODY}.{inside}"


def wrapper_of(key: str, as_text: str) -> str:
    """Return what stands for `model` (or `lm_head`) in the checkpoint's name of a tensor."""
    inside = as_text.partition(".")[2]
    return key.removesuffix(f".{inside}")
