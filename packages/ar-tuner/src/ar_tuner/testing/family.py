"""Check one type of models through every step, from discovery to equal logits after reading back.

    record = check_family("qwen3")
    assert record.failed is None, record.error

Each step that fails ends the check and is named in the record, with what was said.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.api import AutoRound
from ar_tuner.blocks import find_blocks
from ar_tuner.errors import TunerError
from ar_tuner.events import BlockDone, Note
from ar_tuner.registry import find_adapter
from ar_tuner.testing.checkpoints import audit, reload
from ar_tuner.testing.images import calibration_of, image_batch, several
from ar_tuner.testing.tiny import image_text_types, text_types, tiny_model, tiny_rows
from ar_tuner.testing.walking import (
    CLOSE,
    check_called,
    check_walk,
    dead_layers,
    difference,
    logits_of,
    silent_weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from ar_tuner.blocks import Discovery

STEPS = (
    *("build", "forward", "discovery", "walk", "gradients", "tuning", "loss", "names"),
    *("reload", "logits"),
)
"""What a family goes through, in order."""
GROUP = 32
PADDING = 5
"""Tokens at the left of a row that are padding in one of the batches."""


@dataclass
class Record:
    """What became of a family.

    Attributes:
        model_type: as in `config.json`.
        class_name: of the model.
        kind: `text`, or `image-text` for models that also see or hear.
        failed: the step that failed, or None.
        error: what it said.
        place: where in the code it was raised.
        facts: what was found: blocks, layers, calibration, differences.
        seconds: how long it took.
    """

    model_type: str
    class_name: str = ""
    kind: str = "text"
    failed: str | None = None
    error: str = ""
    place: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return dataclasses.asdict(self)


@dataclass
class _Subject:
    """A family under way."""

    record: Record
    folder: Path
    formats: tuple[str, ...]
    model: Any = None
    adapter: Any = None
    batches: list[dict[str, Any]] = field(default_factory=list)
    shown: dict[str, Any] | None = None
    found: Any = None
    job: Any = None
    written: Any = None
    dead: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    losses: list[tuple[str, float | None, float | None]] = field(default_factory=list)


def check_family(
    model_type: str,
    *,
    formats: tuple[str, ...] = ("auto_round",),
    model: nn.Module | None = None,
    options: Mapping[str, Any] | None = None,
) -> Record:
    """Return what becomes of a tiny model of a type on its way through all steps.

    Args:
        model_type: as in `config.json`.
        formats: what is written and read back, in turn.
        model: another model than `tiny_model` makes.
        options: settings of `AutoRound` beside those of the check (two steps, four rows).
    """
    began = time.perf_counter()
    seen = model_type in image_text_types()
    record = Record(model_type, kind="image-text" if seen else "text")
    record.class_name = (text_types() | image_text_types()).get(model_type, "")
    with tempfile.TemporaryDirectory(prefix="family-") as folder:
        subject = _Subject(record, Path(folder), formats, model)
        ways: dict[str, Callable[[_Subject], None]] = {
            "build": _build,
            "forward": _forward,
            "discovery": _discover,
            "walk": _walk,
            "gradients": _gradients,
            "tuning": lambda s: _tune(s, options or {}),
            "loss": _loss,
            "names": _names,
            "reload": _reload,
        }
        for step, way in ways.items():
            try:
                way(subject)
            except Exception as error:  # noqa: BLE001 - whatever a model raises is the finding
                record.failed = _step_of(error, step)
                record.error = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
                record.place = _place(error)
                break
    record.seconds = round(time.perf_counter() - began, 2)
    return record


class _LogitsError(TunerError):
    """A model that was read back predicts something else."""


def _step_of(error: Exception, step: str) -> str:
    return "logits" if isinstance(error, _LogitsError) else step


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{Path(f.filename).stem}:{f.lineno}" for f in reversed(frames[-4:]))


def _build(subject: _Subject) -> None:
    if subject.model is None:
        subject.model = tiny_model(subject.record.model_type)
    subject.record.class_name = type(subject.model).__name__
    subject.record.facts["parameters"] = sum(p.numel() for p in subject.model.parameters())
    subject.adapter = find_adapter(subject.model.config)


def _forward(subject: _Subject) -> None:
    """Make the batches: full rows, rows of which one begins with padding, a row with an image.

    A model that does not run on text alone gets an image in every row.
    """
    entry, sees = subject.adapter.entry(subject.model), subject.record.kind != "text"
    image = image_batch(subject.model, entry) if sees else None
    try:
        plain = dict(subject.adapter.inputs(subject.model, tiny_rows(2)))
        logits_of(subject.model, subject.adapter, plain)
    except Exception:
        if image is None:
            raise
        subject.shown, plain, image = image, several(image, range(2)), None
    subject.batches = [plain, padded(plain)]
    logits_of(subject.model, subject.adapter, subject.batches[1])
    subject.batches += [] if image is None else [image]
    subject.record.facts |= {
        "calibration": "text" if subject.shown is None else "image",
        "images": image is not None or subject.shown is not None,
    }


def padded(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose first row begins with padding."""
    ids: Tensor = batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return {**batch, "attention_mask": mask}


def _discover(subject: _Subject) -> None:
    model, adapter, record = subject.model, subject.adapter, subject.record
    found: Discovery = find_blocks(model, adapter)
    order = check_called(model, adapter, found, subject.batches)
    subject.found = found
    model.save_pretrained(subject.folder / "source")
    subject.job = AutoRound(subject.folder / "source", scheme="W4A16", group_size=GROUP)
    plan = subject.job.plan()
    record.facts |= {
        "lists": [f"{path} x{len(model.get_submodule(path))}" for path in found.lists],
        "calls": len(order),
        "quantized": len(plan.quantized),
        "kept": dict(Counter(_general(row.reason) for row in plan.fallbacks)),
        "tied": any(row.layer.tied for row in plan.rows),
    }
    if not plan.quantized:
        msg = "no layer is quantized"
        raise TunerError(msg)
    silent = silent_weights(found, plan)
    if silent:
        msg = f"{len(silent)} matrices stay in 16 bit and the plan does not say so: {silent[:4]}"
        raise TunerError(msg)


def _general(reason: str) -> str:
    """Return a reason without the shape that is the tiny model's own."""
    return reason if "is not a multiple of" not in reason else "not a multiple of 32 wide"


def _walk(subject: _Subject) -> None:
    subject.record.facts["walk"] = check_walk(
        subject.model, subject.adapter, subject.found, subject.batches
    )


def _gradients(subject: _Subject) -> None:
    """Find the layers that gradients do not reach; the run has to tell of their blocks."""
    subject.dead = dead_layers(
        *(subject.model, subject.adapter, subject.found, subject.job.plan(), subject.batches)
    )
    layers = [layer for found in subject.dead.values() for layer in found]
    subject.record.facts["unreached"] = dict(Counter(_tail(layer) for layer in layers))
    if len(layers) == len(subject.job.plan().quantized):
        msg = "no gradient reaches any layer"
        raise TunerError(msg)


def _tail(layer: str) -> str:
    """Return the end of a layer's name that it has in common with those of other blocks."""
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :] if numbers else parts)


def _tune(subject: _Subject, options: Mapping[str, Any]) -> None:
    """Quantize the checkpoint of the model with two steps a block, and write it."""
    settings: dict[str, Any] = {
        **{"iters": 2, "nsamples": 4, "seqlen": 24, "batch_size": 2, "group_size": GROUP},
        **{"algorithm": "signround", "model_dtype": "float32"},
    }

    def listen(event: Any) -> None:
        if isinstance(event, BlockDone):
            subject.losses.append((event.name, event.loss_before, event.loss_after))
        elif isinstance(event, Note):
            subject.notes.append(event.text)

    job = AutoRound(
        subject.folder / "source",
        scheme="W4A16",
        on_event=listen,
        **(settings | calibration_of(subject.shown, 4) | dict(options)),
    )
    subject.written = job.quantize_and_save(subject.folder / "made", list(subject.formats))
    told = [note.partition(":")[0] for note in subject.notes]
    silent = sorted(set(subject.dead) - set(told))
    if silent:
        msg = f"no gradient reaches layers of {silent[:4]}, and the run does not say so"
        raise TunerError(msg)


def _loss(subject: _Subject) -> None:
    """Refuse blocks that lose more than rounding to nearest does."""
    worse = [
        f"{name}: {after:.3g} > {before:.3g}"
        for name, before, after in subject.losses
        if before is not None and after is not None and after > before
    ]
    measured = sum(1 for _, _, after in subject.losses if after is not None)
    subject.record.facts["blocks"] = len(subject.losses)
    if worse or not measured:
        msg = f"worse than rounding to nearest, or not measured ({measured}): {worse[:4]}"
        raise TunerError(msg)


def _folders(subject: _Subject) -> dict[str, Path]:
    made = subject.folder / "made"
    several = len(subject.formats) > 1
    return {name: made / name if several else made for name in subject.formats}


def _names(subject: _Subject) -> None:
    for path in _folders(subject).values():
        audit(subject.folder / "source", path, subject.model)


def _reload(subject: _Subject) -> None:
    """Read every checkpoint back and compare its logits with the tuned model's."""
    tuned = subject.written.model.eval()
    wanted = [logits_of(tuned, subject.adapter, batch) for batch in subject.batches]
    floats = [logits_of(subject.model, subject.adapter, batch) for batch in subject.batches]
    subject.record.facts["changed"] = max(map(difference, wanted, floats))
    for name, path in _folders(subject).items():
        opened = reload(path, type(subject.model))
        got = [logits_of(opened, subject.adapter, batch) for batch in subject.batches]
        worst = max(map(difference, got, wanted))
        subject.record.facts.setdefault("formats", {})[name] = worst
        if worst > CLOSE:
            msg = f"{name}: logits differ by {worst:.2g} from the tuned model's"
            raise _LogitsError(msg)
