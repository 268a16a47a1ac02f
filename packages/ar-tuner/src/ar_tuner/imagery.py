"""Calibration with images: what a user asks, and what the adapter of a model that sees answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ar_tuner.errors import TunerError
from ar_tuner.registry import find_adapter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.api import AutoRound
    from ar_tuner.events import Note
    from ar_tuner.others import Inputs


@dataclass(frozen=True)
class Asked:
    """What a user asks that only concerns models that see.

    Attributes:
        dataset: calibration data, which may hold images.
        calibration: `text`, `image` or `mixed`; None: as the data and the model suggest.
        image_folder: where relative names of images are looked for.
        processor: takes text and images; None: the model's own.
        nontext: quantize what looks at images, too.
        source: directory of the checkpoint; None: the model was given.
        allow_download: named sets and images at addresses may be fetched.
        trust_remote_code: code in the checkpoint may run.
    """

    dataset: Any = None
    calibration: str | None = None
    image_folder: tuple[str, ...] = ()
    processor: Any = None
    nontext: bool = False
    source: Path | None = None
    allow_download: bool = False
    trust_remote_code: bool = False

    @property
    def wishes(self) -> list[str]:
        """The arguments that a model without eyes has no use for."""
        given = {
            "calibration": self.calibration not in (None, "text"),
            "image_folder": bool(self.image_folder),
            "processor": self.processor is not None,
            "quant_nontext_module": self.nontext,
        }
        return [name for name, is_given in given.items() if is_given]


class Imagery(Protocol):
    """Samples with images, for calibration; an adapter that has some has it as `imagery`."""

    @property
    def text(self) -> Any:
        """Data for the rows of text beside them, as `calibration_rows` takes."""

    def share(self, nsamples: int) -> int:
        """Return how many of `nsamples` are to be samples with images."""

    def samples(
        self, count: int, *, seqlen: int, seed: int, model: nn.Module
    ) -> tuple[Sequence[Inputs], Sequence[Note]]:
        """Return the inputs of at most `count` samples, one each, and what a user should know."""


def adapter_for(request: AutoRound, model: nn.Module) -> ModelAdapter:
    """Return the adapter of a model, told what the user asks of images.

    Raises:
        TunerError: the model takes no images, as far as is known, and some are asked for.
    """
    settings, config = request.settings, getattr(model, "config", None)
    asked = Asked(
        dataset=request.dataset,
        calibration=settings.calibration,
        image_folder=settings.image_folders,
        processor=request.processor,
        nontext=settings.quant_nontext_module,
        source=request.source,
        allow_download=settings.allow_download,
        trust_remote_code=settings.trust_remote_code,
    )
    found = find_adapter(config)
    configured = getattr(found, "configured", None)
    if configured is not None:
        made: ModelAdapter = configured(asked)
        return made
    if asked.wishes:
        kind = getattr(config, "model_type", type(model).__name__)
        msg = (
            f"{', '.join(asked.wishes)}: model type {kind!r} is not known to see images. Leave it "
            "out; if the model does, install ar-vlm (pip install ar-vlm)."
        )
        raise TunerError(msg)
    return found
