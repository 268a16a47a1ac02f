"""Adapter for models that see: their text decoder is tuned, everything that looks is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_tuner.adapters import GenericAdapter
from ar_tuner.blocks import NON_TEXT

if TYPE_CHECKING:
    from torch import nn

SIGHT = ("vision_config", "visual_config", "vision_encoder_config")
"""Names under which a configuration holds that of its vision part."""


def sees(config: Any) -> bool:
    """Tell whether a configuration is that of a vision-language model."""
    if config is None:
        return False
    text = getattr(config, "text_config", None)
    return text is not None and any(getattr(config, name, None) is not None for name in SIGHT)


class TextDecoderAdapter(GenericAdapter):
    """The generic rules, with the parts that look at images kept in 16 bit for that reason.

    The model is driven through its own whole forward with text alone, so position tables and
    masks are those it makes for text.
    """

    name = "vlm-text"

    def keep(self, name: str, module: nn.Module) -> str | None:
        """Return why a layer stays in high precision, or None."""
        if NON_TEXT.search(name):
            return "vision, audio or projector: calibrated with text only"
        return super().keep(name, module)
