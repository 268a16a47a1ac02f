"""Random pixels in the shape that a model takes, found by trying the shapes that there are.

No processor is asked: what it would do to a picture depends on packages that may be missing.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.testing.tiny import tiny_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    Pixels = dict[str, Any]

_COUNTS = re.compile(r"tokens:\s*(?:tensor\()?(\d+)\)?,? features:?\s*(?:tensor\()?(\d+)")
"""What models say whose image tokens are not as many as the features of the image."""
_TEXT = 16
_FIRST = 4
"""Tokens in a row beside those of the image, and how many of them come before it."""
_TRIES = 4
_MOVED = 1e-6
_PICTURES = {"pixel_values", "image_pixel_values", "image_patches"}
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)


def image_batch(model: nn.Module, entry: nn.Module) -> dict[str, Any] | None:
    """Return a row of tokens with an image that the model looks at, or None if none was found.

    Args:
        model: a tiny model.
        entry: the module whose forward takes the batch.
    """
    config: Any = getattr(entry, "config", None) or getattr(model, "config", None)
    if config is None or _side(config) is None:
        return None
    known = set(inspect.signature(entry.forward).parameters)
    for shape in _SHAPES:
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
            if _looked_at(entry, batch, pixels):
                return batch
    return None


def _accepted(entry: nn.Module, config: Any, pixels: Pixels) -> dict[str, Any] | None:
    """Return the batch with as many image tokens as the model wants, None if it takes none."""
    count = pixels.get("image_tokens", 4)
    kinds = [key for key in ("token_type_ids", "mm_token_type_ids") if pixels.get(key)]
    given = {k: v for k, v in pixels.items() if k not in (*kinds, "image_tokens")}
    for _ in range(_TRIES):
        ids = _row(config, count)
        batch = {"input_ids": ids, "use_cache": False, **given}
        spans = torch.zeros_like(ids)
        spans[:, _FIRST : _FIRST + count] = 1
        batch |= dict.fromkeys(kinds, spans)
        try:
            _run(entry, batch)
        except _REFUSALS as error:
            said = _COUNTS.search(str(error))
            wanted = int(said[2]) if said else count
            width = getattr(config.get_text_config(), "hidden_size", 0) or 1
            if wanted >= width and wanted % width == 0:  # some say how many numbers
                wanted //= width
            if wanted in (count, 0):
                return None
            count = wanted
        else:
            return batch
    return None


def _looked_at(entry: nn.Module, batch: Mapping[str, Any], pixels: Pixels) -> bool:
    """Tell whether other pixels give other logits."""
    before = _run(entry, batch)
    after = _run(entry, {**batch, **{k: batch[k].flip(-1) * 2 for k in _PICTURES & set(pixels)}})
    same = before.shape == after.shape and float((before - after).abs().max()) <= _MOVED
    return bool(torch.isfinite(before).all()) and not same


def _run(entry: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        output: Any = entry(**batch)
    logits = getattr(output, "logits", None)
    found: Tensor = output[0] if logits is None else logits
    return found.float()


def _row(config: Any, count: int) -> Tensor:
    ids = tiny_rows(1, _TEXT + count, seed=2)
    names = ("image_token_id", "image_token_index", "image_token")
    token = next((t for n in names if (t := getattr(config, n, None)) is not None), None)
    if token is None:
        token = getattr(getattr(config, "vision_config", None), "image_token_id", None)
    if isinstance(token, int):
        ids[:, _FIRST : _FIRST + count] = token
    return ids


def _side(config: Any) -> int | None:
    """Return the side of an image in pixels, None where the model has no eyes."""
    vision = _vision(config)
    for size in (getattr(vision, "image_size", None), getattr(config, "image_size", None)):
        if size is not None:
            return int(size if isinstance(size, int) else size[0])
    patch = getattr(vision, "patch_size", None)
    return None if vision is None else 4 * (patch if isinstance(patch, int) else 14)


def _vision(config: Any) -> Any:
    for name in ("vision_config", "visual_config", "vq_config"):
        found = getattr(config, name, None)
        if found is not None:
            return found
    return None


def _pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _plain(config: Any) -> Pixels:
    side = _side(config) or 0
    return {"pixel_values": _pixels(1, 3, side, side)}


def _marked(config: Any) -> Pixels:
    return {**_plain(config), "token_type_ids": True}


def _sized(config: Any) -> Pixels:
    side = _side(config)
    return {**_plain(config), "image_sizes": torch.tensor([[side, side]])}


def _listed(config: Any) -> Pixels:
    side = _side(config) or 0
    return {"pixel_values": _pixels(1, 1, 3, side, side)}


def _tiled(config: Any) -> Pixels:
    side = _side(config) or 0
    return {
        "pixel_values": _pixels(1, 3, 3, side, side),
        "image_sizes": torch.tensor([[side, 2 * side]]),
    }


def _flat(config: Any) -> Pixels:
    """Patches one after the other, and how they lie (Qwen's way)."""
    vision: Any = config.vision_config
    channels: Any = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    depth = getattr(vision, "temporal_patch_size", 1)
    width = channels * depth * vision.patch_size**2
    grid = torch.tensor([[1, 4, 4]])
    return {"pixel_values": _pixels(16, width), "image_grid_thw": grid, "mm_token_type_ids": True}


def _flat_unmarked(config: Any) -> Pixels:
    return {k: v for k, v in _flat(config).items() if k != "mm_token_type_ids"}


def _cut(config: Any) -> Pixels:
    """Patches one after the other, each an image of its own (Kimi's way)."""
    size = config.vision_config.patch_size
    return {"pixel_values": _pixels(16, 3, size, size), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _placed(config: Any) -> Pixels:
    """Flat patches with their places (Gemma 4's way)."""
    vision = config.vision_config
    side = 2 * int(getattr(vision, "pooling_kernel_size", 3))
    steps = torch.arange(side)
    places = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(1, side**2, 2)
    return {
        "pixel_values": _pixels(1, side**2, 3 * vision.patch_size**2).sigmoid(),
        "image_position_ids": places,
        "mm_token_type_ids": True,
    }


def _crossed(config: Any) -> Pixels:
    """Tiles for cross-attention, without tokens in the row (mllama)."""
    side = _side(config) or 0
    return {
        "image_tokens": 0,
        "pixel_values": _pixels(1, 1, 4, 3, side, side),
        "aspect_ratio_ids": torch.tensor([[6]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, _TEXT, 1, 4, dtype=torch.long),
    }


def _cropped(config: Any) -> Pixels:
    """A picture and its crops, with a mask of patches (phi4_multimodal)."""
    side = config.vision_config.crop_size
    patches = side // config.vision_config.patch_size
    return {
        "image_tokens": 13,
        "image_pixel_values": _pixels(1, 2, 3, side, side),
        "image_sizes": torch.tensor([[side, side]]),
        "image_attention_mask": torch.ones(1, 2, patches, patches),
    }


def _words(config: Any) -> Pixels:
    """Patches in the place of words (fuyu)."""
    return {"image_patches": _pixels(1, 4, 3 * config.patch_size**2)}


_SHAPES: tuple[Callable[[Any], Pixels], ...] = (
    *(_flat, _flat_unmarked, _cut, _placed, _cropped, _crossed, _words),
    *(_tiled, _marked, _sized, _plain, _listed),
)
"""The shapes, those that the fewest models take first."""
