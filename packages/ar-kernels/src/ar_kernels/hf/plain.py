"""Open a model by Transformers' own `from_pretrained`, past what a class of its own adds to it.

Qwen2.5-Omni's looks for a file of voices beside the weights, and for that takes what the plain one
gives for a model: it cannot be asked which tensors were missing, nor to open weights in memory.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

VOICES = "spk_dict.pt"
"""The file of voices."""


def plain_opening(kind: Any, config: Any = None) -> Callable[..., Any]:
    """Return a class's `from_pretrained`; the plain one where its own wants voices.

    Args:
        kind: the class of a model, or an Auto class.
        config: of the model, for an Auto class.
    """
    from transformers import PreTrainedModel

    found = _class_of(kind, config)
    if found is None or not hasattr(found, "load_speakers"):
        opening: Callable[..., Any] = kind.from_pretrained
        return opening
    plain: Any = PreTrainedModel.from_pretrained
    return functools.partial(plain.__func__, found)


def _class_of(kind: Any, config: Any) -> Any:
    """Return the class of a model that an Auto class stands for, None where it is not known."""
    mapping = getattr(kind, "_model_mapping", None)
    if mapping is None:
        return kind
    if config is None or type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found if isinstance(found, type) else None
