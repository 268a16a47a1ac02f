"""Calibration with images: which part of the data shows some, and its samples as model inputs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ar_tuner.calibration.files import is_local, read_path
from ar_tuner.calibration.records import CHAT_KEYS
from ar_tuner.calibration.rows import requests_of
from ar_tuner.events import Note
from ar_vlm.errors import VlmError
from ar_vlm.inputs import Inputs
from ar_vlm.samples import Sample, read_samples
from ar_vlm.samples.read import known_set

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from ar_tuner.calibration import SetRequest
    from ar_tuner.imagery import Asked
    from ar_tuner.others import Inputs as ModelInputs

MIXED = 4
"""One sample in so many shows images, in a mix."""
PEEKED = 32
"""Records of a file that tell whether it shows images."""
_KEYS = ("image", "images", "image_path", "video", "videos")
_PARTS = ("image", "image_url", "input_image", "video", "input_video")


@dataclass(frozen=True)
class Data:
    """A user's calibration data, told apart.

    Attributes:
        text: what makes rows of text, as ar-tuner takes it; None: the embedded text.
        shown: sets that show images, or records that do.
    """

    text: Any = None
    shown: tuple[Any, ...] = ()

    @classmethod
    def of(cls, dataset: Any, *, unknown: bool = False) -> Data:
        """Return data told apart; nothing but the first records of files is read.

        `unknown`: names that nothing is known of are taken for sets that show images.
        """
        requests = requests_of(dataset)
        if requests is not None:
            shown = tuple(r for r in requests if _shows(r, unknown=unknown))
            rest = tuple(r for r in requests if r not in shown)
            return cls(rest if shown and rest else None if shown else dataset, shown)
        if isinstance(dataset, (list, tuple)):
            seen = [shows(record) for record in dataset]
            if any(seen):
                shown = tuple(itertools.compress(dataset, seen))
                rest_of = [r for r, is_seen in zip(dataset, seen, strict=True) if not is_seen]
                return cls(rest_of or None, shown)
        return cls(dataset)


@dataclass(frozen=True)
class ImageCalibration:
    """Samples with images for calibration; satisfies `ar_tuner.imagery.Imagery`.

    Attributes:
        text: what makes the rows of text beside them.
        shown: sets that show images, or records that do.
        asked: what the user asks.
        alone: there are no rows of text.
    """

    text: Any
    shown: tuple[Any, ...]
    asked: Asked
    alone: bool = False

    @classmethod
    def of(cls, asked: Asked, *, demanded: bool, kind: str) -> ImageCalibration | None:
        """Return the calibration that is asked for, None where it is of text only.

        Args:
            asked: what the user asks.
            demanded: the model does not run without images.
            kind: the type of the model, for messages.

        Raises:
            VlmError: images are asked for and there are none, or the other way round.
        """
        hinted = asked.calibration in ("image", "mixed") or bool(asked.image_folder)
        data = Data.of(asked.dataset, unknown=hinted)
        if asked.calibration == "text" or (asked.calibration is None and not data.shown):
            if data.shown:
                names = ", ".join(getattr(s, "label", "the records given") for s in data.shown[:3])
                msg = (
                    f"calibration 'text' is asked for, and {names} shows images. Leave one of "
                    "them out, or use calibration 'mixed'."
                )
                raise VlmError(msg)
            return None
        if not data.shown:
            msg = (
                f"calibration {asked.calibration!r} needs samples with images: name a file of "
                "them as dataset (see the README of ar-vlm), and their folder as image_folder"
            )
            raise VlmError(msg)
        if demanded and asked.calibration == "mixed":
            msg = (
                f"model type {kind!r} does not run without images, so text cannot be mixed in: "
                "use calibration 'image'"
            )
            raise VlmError(msg)
        return cls(data.text, data.shown, asked, alone=demanded or asked.calibration == "image")

    def share(self, nsamples: int) -> int:
        """Return how many of `nsamples` are to be samples with images."""
        return nsamples if self.alone else max(1, nsamples // MIXED)

    def samples(
        self, count: int, *, seqlen: int, seed: int, model: nn.Module
    ) -> tuple[Sequence[ModelInputs], Sequence[Note]]:
        """Return the inputs of at most `count` samples, and what a user should know.

        Samples are drawn evenly from all there are; each set gives an equal share, or what its
        `num` says.

        Raises:
            VlmError: no processor, or a sample that cannot be read.
        """
        builder = self._builder(seqlen)
        drawn = self._drawn(count, seed)
        if not drawn:
            msg = "the samples with images are none: the data holds no record"
            raise VlmError(msg)
        built = [builder.built(sample) for sample in drawn]
        kind = getattr(getattr(model, "config", None), "text_config", None)
        _check_ids([b.inputs for b in built], getattr(kind, "vocab_size", None))
        texts = sum(not b.seen for b in built)
        notes = []
        for way, what in _WAYS.items():
            if number := sum(b.way == way for b in built):
                notes.append(Note("info", f"calibration: {number} {what}"))
        if cut := sum(b.cut > 0 for b in built):
            notes.append(Note("info", f"calibration: {cut} samples cut to {seqlen} tokens"))
        if texts:
            notes.append(Note("info", f"calibration: {texts} of the samples show no image"))
        return [b.inputs for b in built], notes

    def _builder(self, seqlen: int) -> Inputs:
        asked = self.asked
        if asked.processor is None and asked.source is None:
            msg = "a model that is given needs its processor for images: AutoRound(processor=...)"
            raise VlmError(msg)
        return Inputs.from_pretrained(
            asked.source or "",
            processor=asked.processor,
            seqlen=seqlen,
            trust_remote_code=asked.trust_remote_code,
        )

    def _drawn(self, count: int, seed: int) -> list[Sample]:
        chance = random.Random(seed)  # noqa: S311 - an order, not a secret
        options: dict[str, Any] = {
            "images": self.asked.image_folder,
            "allow_download": self.asked.allow_download,
        }
        if not hasattr(self.shown[0], "splits"):
            pools = [(read_samples(self.shown, **options), count)]
        else:
            part = -(-count // len(self.shown))
            pools = [(_read(r, options), min(part, r.num or part)) for r in self.shown]
        drawn: list[Sample] = []
        for pool, wanted in pools:
            chance.shuffle(pool)
            drawn += pool[:wanted]
        chance.shuffle(drawn)
        return drawn[:count]


_WAYS = {
    "untemplated": "samples are plain text: neither processor nor tokenizer has a chat template",
    "refused": "samples are plain text: the chat template does not take them",
}


def shows(record: Any) -> bool:
    """Tell whether a record shows images."""
    if isinstance(record, Sample):
        return bool(record.pictures)
    if isinstance(record, (list, tuple)):
        return any(isinstance(m, Mapping) and _message_shows(m) for m in record)
    if not isinstance(record, Mapping):
        return False
    chats = (record[k] for k in CHAT_KEYS if isinstance(record.get(k), (list, tuple)))
    return any(record.get(k) for k in _KEYS) or any(shows(chat) for chat in chats)


def _message_shows(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else ()
    return any(isinstance(p, Mapping) and p.get("type") in _PARTS for p in parts)


def _shows(request: SetRequest, *, unknown: bool) -> bool:
    """Tell whether a set shows images: one of its first records does, or it says so."""
    known = known_set(request.name)
    if known is not None:
        return bool(getattr(known, "shows_images", False))
    if not is_local(request.name):
        return unknown
    records = read_path(Path(request.name), splits=request.splits)
    return any(shows(record) for record in itertools.islice(records, PEEKED))


def _read(request: SetRequest, options: Mapping[str, Any]) -> list[Sample]:
    if request.splits and is_local(request.name):
        path = Path(request.name).expanduser()
        home = path if path.is_dir() else path.parent
        folders = (*options["images"], home)
        records = read_path(path, splits=request.splits)
        return read_samples(records, **{**options, "images": folders})
    return read_samples(request.name, **options)


def _check_ids(samples: Sequence[ModelInputs], vocabulary: int | None) -> None:
    if vocabulary is None or not samples:
        return
    most = max(int(sample["input_ids"].max()) for sample in samples)
    if most >= vocabulary:
        msg = (
            f"token id {most} is outside the model's vocabulary of {vocabulary} tokens: use the "
            "processor that belongs to the model"
        )
        raise VlmError(msg)
