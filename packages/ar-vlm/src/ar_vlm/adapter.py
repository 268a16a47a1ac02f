"""Adapter for models that see: what is tuned, what is kept and why, what goes through the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ar_tuner.adapters import GenericAdapter
from ar_tuner.blocks import NON_TEXT
from ar_tuner.imagery import Asked
from ar_vlm.calibration import ImageCalibration
from ar_vlm.errors import VlmError
from ar_vlm.towers import further_blocks, kept_part

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

SIGHT = ("vision_config", "visual_config", "vision_encoder_config", "img_processor")
"""Names under which a configuration holds that of its vision part."""
READING = ("text_config", "llm_config", "language_config", "vocab_size")
"""Names under which it holds that of its text part, or shows that it is one itself."""
NEEDS_IMAGES = frozenset(
    [
        "blip",
        "blip-2",
        "idefics",
        "instructblip",
        "instructblipvideo",
        "kosmos-2",
    ]
)
"""Model types whose forward demands pixels."""
_INDEX = re.compile(r"\.layers\.(\d+)\.")


def sees(config: Any) -> bool:
    """Tell whether a configuration is that of a vision-language model.

    Of models of several parts (omni), that of the part that reads and sees counts.
    """
    if config is None:
        return False
    thinker = getattr(config, "thinker_config", None)
    if thinker is not None:
        return sees(thinker)
    reads = any(getattr(config, name, None) is not None for name in READING)
    return reads and any(getattr(config, name, None) is not None for name in SIGHT)


def silent_blocks(config: Any) -> frozenset[int]:
    """Return the decoder blocks that attend to images only, and so never run on text."""
    text = getattr(config, "text_config", None)
    return frozenset(getattr(text, "cross_attention_layers", None) or ())


class VisionLanguageAdapter(GenericAdapter):
    """The generic rules, driven by text, by images or by both.

    The model runs its own whole forward, so positions and masks, image features between blocks
    and attention to images are those it makes.

    Args:
        kind: type of the model.
        silent: indices of decoder blocks that a text never reaches (cross-attention to images).
        asked: what the user asks.
    """

    name = "vlm"

    def __init__(
        self, kind: str = "", silent: frozenset[int] = frozenset(), asked: Asked | None = None
    ) -> None:
        self._kind = kind
        self._silent = silent
        self._asked = Asked() if asked is None else asked
        self.imagery = (
            None
            if asked is None
            else ImageCalibration.of(asked, demanded=kind in NEEDS_IMAGES, kind=kind)
        )

    def configured(self, asked: Asked) -> VisionLanguageAdapter:
        """Return the adapter for what a user asks.

        Raises:
            VlmError: images are asked for and there are none, or the other way round.
        """
        return type(self)(self._kind, self._silent, asked)

    def inputs(self, model: nn.Module, rows: Tensor) -> Mapping[str, object]:
        """Return the keyword arguments of the model's forward for token rows [B, T].

        Raises:
            VlmError: the model does not run without images.
        """
        kind = getattr(getattr(model, "config", None), "model_type", "")
        if kind in NEEDS_IMAGES:
            msg = (
                f"model type {kind!r} does not run without images: give samples with images as "
                "dataset, or use recipe 'rtn', which needs no calibration"
            )
            raise VlmError(msg)
        return super().inputs(model, rows)

    def keep(self, name: str, module: nn.Module) -> str | None:
        """Return why a layer stays in high precision, or None."""
        if NON_TEXT.search(name):
            if not self._asked.nontext:
                return "looks at images or listens: quant_nontext_module is off"
            if (why := kept_part(name)) is not None:
                return why
        index = _INDEX.search(name)
        silent = index is not None and int(index[1]) in self._silent and not NON_TEXT.search(name)
        if silent and self.imagery is None:
            return "attends to images: never run on text, and no image samples were given"
        return super().keep(name, module)

    def further_blocks(self, model: nn.Module, lists: Sequence[str]) -> tuple[str, ...]:
        """Return the blocks that look at images, if they are to be quantized, too.

        Args:
            model: the model.
            lists: paths of the lists of decoder blocks.
        """
        return further_blocks(model, self.entry(model), lists) if self._asked.nontext else ()

    def check_reached(self, layers: Sequence[str], note: Callable[[Any, str], None]) -> None:
        """Judge the layers to be quantized that a row of text gives no gradient.

        Raises:
            VlmError: there are some, and the user did not ask for calibration with text alone.
        """
        if not layers:
            return
        shown = ", ".join(layers[:4]) + (", ..." if len(layers) > 4 else "")  # noqa: PLR2004
        what = f"text alone does not reach {len(layers)} layers to be quantized ({shown})"
        if self._asked.calibration == "text" and not self._asked.nontext:
            note("warning", f"{what}: nothing but their weights decides how they are rounded")
            return
        msg = (
            f"{what}, so calibration needs samples with images: name a file of them as dataset "
            "and their folder as image_folder. Or leave those layers out (ignore_layers), or use "
            "calibration 'text' to round them without."
        )
        raise VlmError(msg)
