"""Rows of tokens with random pixels in the shape that a model takes, found by trying.

No processor is asked: what it would do to a picture depends on packages that may be missing.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.testing.pixels import FIRST, SHAPES, TEXT, side_of
from ar_tuner.testing.tiny import first_word, tiny_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from ar_tuner.testing.pixels import Pixels

_COUNTS = re.compile(r"tokens:\s*(?:tensor\()?(\d+)\)?,? features:?\s*(?:tensor\()?(\d+)")
"""What models say whose image tokens are not as many as the features of the image."""
_TRIES = 4
_MOVED = 1e-6
_PICTURES = ("pixel_values", "image_pixel_values", "image_patches", "flattened_patches")
_SPANS = ("token_type_ids", "mm_token_type_ids", "image_embeds_position_mask")
"""What tells tokens of an image from others, where `True` stands in a shape."""
_WORDS = ("input_ids", "qformer_input_ids")
_PLACES = 2
"""Numbers before the pixels of a flattened patch: its row and column."""
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)


def image_batch(model: nn.Module, entry: nn.Module) -> dict[str, Any] | None:
    """Return a row of tokens with an image that the model looks at, or None if none was found.

    Args:
        model: a tiny model.
        entry: the module whose forward takes the batch.
    """
    config: Any = getattr(entry, "config", None) or getattr(model, "config", None)
    if config is None or side_of(config) is None:
        return None
    known = set(inspect.signature(entry.forward).parameters)
    for shape in SHAPES:
        try:
            pixels = shape(config)
        except _REFUSALS:
            continue
        if not set(pixels) - {"image_tokens"} <= known:
            continue
        batch = _accepted(entry, config, pixels)
        if batch is None:
            continue
        with contextlib.suppress(*_REFUSALS):
            if _looked_at(entry, batch):
                return batch
    return None


def other_sample(batch: Mapping[str, Any], seed: int, *, text: bool = True) -> dict[str, Any]:
    """Return a batch like one of `image_batch`, with other pixels and, if `text`, other words."""
    generator = torch.Generator().manual_seed(seed)
    out = dict(batch)
    for name in _PICTURES:
        if (old := batch.get(name)) is not None:
            out[name] = torch.randn(old.shape, generator=generator)
            if name == "flattened_patches":
                out[name][..., :_PLACES] = old[..., :_PLACES]
    for name in _WORDS if text else ():
        if (ids := batch.get(name)) is not None:
            words = tiny_rows(*ids.shape, seed=seed)
            out[name] = torch.where(ids >= first_word(), words, ids)
    return out


def several(batch: Mapping[str, Any], seeds: range) -> dict[str, Any]:
    """Return samples like one, with other pixels and words, as a batch."""
    made = [other_sample(batch, seed) for seed in seeds]
    return {
        name: torch.cat([one[name] for one in made]) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def calibration_of(shown: Mapping[str, Any] | None, count: int) -> dict[str, Any]:
    """Return the settings of `AutoRound` for calibration with `count` samples like one.

    Args:
        shown: a row with an image; None for rows of text.
        count: of samples.
    """
    if shown is None:
        return {"dataset": list(tiny_rows(count, seed=2))}
    from PIL import Image  # where a model sees, ar-vlm is installed, which needs it

    def made(sample: Any) -> dict[str, Any]:
        return other_sample(shown, seed=sample.images()[0].width)

    records = [{"image": Image.new("RGB", (8 + i, 8)), "caption": "x"} for i in range(count)]
    return {"dataset": records, "calibration": "image", "processor": made}


def _accepted(entry: nn.Module, config: Any, pixels: Pixels) -> dict[str, Any] | None:
    """Return the batch with as many image tokens as the model wants, None if it takes none."""
    count = pixels.get("image_tokens", 4)
    kinds = [key for key in _SPANS if pixels.get(key) is True]
    given = {k: v for k, v in pixels.items() if k not in (*kinds, "image_tokens")}
    tried: list[int] = []
    for _ in range(_TRIES):
        ids = _row(config, count)
        batch = {"input_ids": ids, "use_cache": False, **given}
        spans = torch.zeros_like(ids)
        spans[:, FIRST : FIRST + count] = 1
        batch |= dict.fromkeys(kinds, spans)
        try:
            _run(entry, batch)
        except _REFUSALS as error:
            said = _COUNTS.search(str(error))
            wanted = int(said[2]) if said else 0
            width = getattr(config.get_text_config(), "hidden_size", 0) or 1
            whole = wanted % width == 0  # some say how many numbers
            tried.append(count)
            counts = [wanted // width, wanted] if whole else [wanted]
            count = next((n for n in counts if n not in tried), 0)
            if not count:
                return None
        else:
            return batch
    return None


def _looked_at(entry: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Tell whether other pixels give other logits."""
    before = _run(entry, batch)
    after = _run(entry, other_sample(batch, 4, text=False))
    same = before.shape == after.shape and float((before - after).abs().max()) <= _MOVED
    return bool(torch.isfinite(before).all()) and not same


def _run(entry: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        output: Any = entry(**batch)
    logits = getattr(output, "logits", None)
    found: Tensor = output[0] if logits is None else logits
    return found.float()


def _row(config: Any, count: int) -> Tensor:
    ids = tiny_rows(1, TEXT + count, seed=2)
    names = ("image_token_id", "image_token_index", "image_token", "video_token_index")
    token = next((t for n in names if (t := getattr(config, n, None)) is not None), None)
    if token is None:
        token = getattr(getattr(config, "vision_config", None), "image_token_id", None)
    if isinstance(token, int):
        ids[:, FIRST : FIRST + count] = token
    return ids
