"""Adapter for models that see: their text decoder is tuned, everything that looks is kept."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ar_tuner.adapters import GenericAdapter
from ar_tuner.blocks import NON_TEXT
from ar_vlm.errors import VlmError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

SIGHT = ("vision_config", "visual_config", "vision_encoder_config")
"""Names under which a configuration holds that of its vision part."""
NEEDS_IMAGES = frozenset(
    [
        "blip",
        "blip-2",
        "hunyuan_vl",
        "idefics",
        "instructblip",
        "instructblipvideo",
        "kosmos-2",
        "kosmos-2.5",
    ]
)
"""Model types whose forward demands pixels."""
_INDEX = re.compile(r"\.layers\.(\d+)\.")


def sees(config: Any) -> bool:
    """Tell whether a configuration is that of a vision-language model."""
    if config is None:
        return False
    text = getattr(config, "text_config", None)
    return text is not None and any(getattr(config, name, None) is not None for name in SIGHT)


def silent_blocks(config: Any) -> frozenset[int]:
    """Return the decoder blocks that attend to images only, and so never run on text."""
    text = getattr(config, "text_config", None)
    return frozenset(getattr(text, "cross_attention_layers", None) or ())


class TextDecoderAdapter(GenericAdapter):
    """The generic rules, with the parts that look at images kept in 16 bit for that reason.

    The model is driven through its own whole forward with text alone, so position tables and
    masks are those it makes for text.

    Args:
        silent: indices of decoder blocks that a text never reaches (cross-attention to images).
    """

    name = "vlm-text"

    def __init__(self, silent: frozenset[int] = frozenset()) -> None:
        self._silent = silent

    def inputs(self, model: nn.Module, rows: Tensor) -> Mapping[str, object]:
        """Return the keyword arguments of the model's forward for token rows [B, T].

        Raises:
            VlmError: the model does not run without images.
        """
        kind = getattr(getattr(model, "config", None), "model_type", "")
        if kind in NEEDS_IMAGES:
            msg = (
                f"model type {kind!r} does not run without images, and this version calibrates "
                "with text only. Use recipe 'rtn', which needs no calibration."
            )
            raise VlmError(msg)
        return super().inputs(model, rows)

    def keep(self, name: str, module: nn.Module) -> str | None:
        """Return why a layer stays in high precision, or None."""
        if NON_TEXT.search(name):
            return "vision, audio or projector: calibrated with text only"
        index = _INDEX.search(name)
        if index is not None and int(index[1]) in self._silent:
            return "attends to images: never run on text, which is all this version calibrates with"
        return super().keep(name, module)
