"""A small model of a family on its whole way with images: calibration, tuning, export, reading.

    record = check_images("qwen3_vl", folder)

ar-export has to be installed: it writes the checkpoint.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner import AutoRound
from ar_tuner.events import BlockDone
from ar_tuner.others import fitted
from ar_tuner.testing.checkpoints import reload
from ar_tuner.testing.walking import CLOSE, difference
from ar_vlm.errors import VlmError
from ar_vlm.inputs import Inputs
from ar_vlm.samples import read_samples
from ar_vlm.testing.drawing import write_samples
from ar_vlm.testing.families import FAMILIES
from ar_vlm.testing.tiny import make_tiny

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLES = 6
"""Chats that calibrate, and one more that is compared."""
STEPS = 2


@dataclass(frozen=True)
class ImageRecord:
    """What a family's way with images showed.

    Attributes:
        family: its name.
        processor: class of what made the model's inputs.
        blocks: tuned ones.
        layers: quantized ones.
        changed: how far the tuned model's logits are from the source's, relative to the largest.
        worst: how far those of the checkpoint read back are from the tuned model's.
    """

    family: str
    processor: str
    blocks: int
    layers: int
    changed: float
    worst: float


def missing_package(family: str) -> str | None:
    """Return the package that a family's image processor needs and that does not load, or None."""
    if not FAMILIES[family].torchvision:
        return None
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # the latter where it was built for another torch
        return "torchvision"
    return None


def check_images(family: str, folder: str | Path) -> ImageRecord:
    """Tune a small model of a family on samples with images, write it, read it, compare logits.

    Args:
        family: one of `FAMILIES`.
        folder: for the model, the samples and the checkpoint.

    Raises:
        VlmError: a block that lost more than rounding to nearest does, a model that does not look
            at the image, or logits that differ after reading back.
    """
    folder = Path(folder)
    source = make_tiny(family, folder / "source")
    samples = read_samples(write_samples(folder / "samples", SAMPLES + 1))
    losses: list[tuple[str, float | None, float | None]] = []

    def listen(event: Any) -> None:
        if isinstance(event, BlockDone):
            losses.append((event.name, event.loss_before, event.loss_after))

    job = AutoRound(
        source,
        scheme="W4A16",
        dataset=samples[:SAMPLES],
        calibration="image",
        on_event=listen,
        **{"iters": STEPS, "nsamples": SAMPLES, "seqlen": 64, "batch_size": 2, "group_size": 32},
        **{"algorithm": "signround", "model_dtype": "float32"},
    )
    written = job.quantize_and_save(folder / "made", "auto_round")
    worse = [n for n, before, after in losses if before is None or after is None or after > before]
    if worse or not losses:
        msg = f"{family}: blocks worse than rounding to nearest, or not measured: {worse[:4]}"
        raise VlmError(msg)
    inputs = Inputs.from_pretrained(written.path)
    tuned, opened = written.model.eval(), reload(written.path, type(written.model))
    floats = reload(source, type(written.model))
    batch = inputs.build(samples[SAMPLES])
    wanted = _logits(tuned, batch)
    if difference(_logits(tuned, _grey(batch)), wanted) <= CLOSE:
        msg = f"{family}: the logits do not depend on the image"
        raise VlmError(msg)
    worst = difference(_logits(opened, batch), wanted)
    if worst > CLOSE:
        msg = f"{family}: logits differ by {worst:.2g} from the tuned model's"
        raise VlmError(msg)
    layers = len(job.plan().quantized)
    changed = difference(wanted, _logits(floats, batch))
    name = type(inputs.processor).__name__
    return ImageRecord(family, name, len(losses), layers, changed, worst)


def _grey(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with a grey image (some models leave out what is all zeros)."""
    seen = [name for name in batch if "pixel" in name and "mask" not in name]
    return {**batch, **{name: torch.full_like(batch[name], 0.5) for name in seen}}


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    given = fitted([batch], model, None)[0]
    with torch.no_grad():
        found: Tensor = model(**given).logits
    return found.float()
