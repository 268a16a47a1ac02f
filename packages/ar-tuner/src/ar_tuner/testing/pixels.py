"""Pixels of one image in each shape that models take: what `image_batch` tries in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.testing.tiny import tiny_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Pixels = dict[str, Any]

TEXT = 16
"""Tokens in a row beside those of the image."""
FIRST = 6
"""How many of them come before the image: more than are padding in a padded row."""


def side_of(config: Any) -> int | None:
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
    side = side_of(config) or 0
    return {"pixel_values": _pixels(1, 3, side, side)}


def _marked(config: Any) -> Pixels:
    return {**_plain(config), "token_type_ids": True}


def _sized(config: Any) -> Pixels:
    side = side_of(config)
    return {**_plain(config), "image_sizes": torch.tensor([[side, side]])}


def _positioned(config: Any) -> Pixels:
    """The places of the image's tokens in a row of their own (Kosmos 2)."""
    count = config.latent_query_num
    return {**_plain(config), "image_embeds_position_mask": True, "image_tokens": count}


def _flattened(config: Any) -> Pixels:
    """Patches that begin with their row and column, from 1 (Kosmos 2.5)."""
    width = config.vision_config.patch_embed_hidden_size
    steps = torch.arange(1, 5)
    places = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).reshape(1, 16, 2)
    return {
        "flattened_patches": torch.cat([places.float(), _pixels(1, 16, width)], -1),
        "image_embeds_position_mask": True,
        "image_tokens": config.latent_query_num,
    }


def _questioned(config: Any) -> Pixels:
    """A question to the image beside the text (InstructBLIP)."""
    question = tiny_rows(1, 8, seed=4)
    count = config.num_query_tokens
    return {**_plain(config), "qformer_input_ids": question, "image_tokens": count}


def _filmed(config: Any) -> Pixels:
    """Four frames in the place of an image (InstructBLIP for videos)."""
    side = side_of(config) or 0
    count = 4 * config.num_query_tokens
    frames = _pixels(1, 4, 3, side, side)
    return {**_questioned(config), "pixel_values": frames, "image_tokens": count}


def _attended(config: Any) -> Pixels:
    """Images for cross-attention, and which of them each token looks at (IDEFICS)."""
    mask = torch.ones(1, TEXT, 1, dtype=torch.long)
    return {**_listed(config), "image_attention_mask": mask, "image_tokens": 0}


def _listed(config: Any) -> Pixels:
    side = side_of(config) or 0
    return {"pixel_values": _pixels(1, 1, 3, side, side)}


def _tiled(config: Any) -> Pixels:
    side = side_of(config) or 0
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


def _cut_marked(config: Any) -> Pixels:
    return {**_cut(config), "mm_token_type_ids": True}


def _merged(config: Any) -> Pixels:
    """Flat patches, and how many of them become one (VideoLLaMA 3)."""
    return {**_flat_unmarked(config), "image_merge_sizes": torch.tensor([2])}


def _spaced(config: Any) -> Pixels:
    """Flat patches, which of them there are, and how many in height and width (LFM2-VL)."""
    width = 3 * config.vision_config.patch_size**2
    return {
        "pixel_values": _pixels(1, 16, width),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


def _twofold(config: Any) -> Pixels:
    """The image in two sizes (DeepSeek-VL's hybrid)."""
    side = config.high_res_vision_config.image_size
    return {**_plain(config), "high_res_pixel_values": _pixels(1, 3, side, side)}


def _masked(config: Any) -> Pixels:
    """Tiles, and which of their pixels are of the image (SmolDocling)."""
    side = side_of(config) or 0
    mask = torch.ones(1, 1, side, side, dtype=torch.long)
    return {**_listed(config), "pixel_attention_mask": mask}


def _folded(config: Any) -> Pixels:
    """Patches as short films, channels last, each one token (Inkling's way)."""
    vision = config.vision_config
    size = vision.patch_size
    return {"pixel_values": _pixels(4, vision.temporal_patch_size, size, size, 3)}


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
    side = side_of(config) or 0
    return {
        "image_tokens": 0,
        "pixel_values": _pixels(1, 1, 4, 3, side, side),
        "aspect_ratio_ids": torch.tensor([[6]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, TEXT, 1, 4, dtype=torch.long),
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


SHAPES: tuple[Callable[[Any], Pixels], ...] = (
    *(_merged, _flat, _flat_unmarked, _cut_marked, _cut, _folded, _placed, _cropped, _crossed),
    *(_words, _flattened, _positioned, _questioned, _filmed, _attended, _twofold, _spaced),
    *(_masked, _tiled, _marked, _sized, _plain, _listed),
)
"""The shapes, those that the fewest models take first.

Each gives keyword arguments of the forward; beside them `image_tokens`, tokens that stand for the
image, and `True` for what marks those tokens in the row.
"""
