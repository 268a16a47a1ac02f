"""Further families of small models: those whose pictures need torchvision, and parts of others."""

from __future__ import annotations

from typing import Any

from ar_vlm.testing.family import CLIP, ROPE, SQUARE, Family

OMNI = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
OMNI_MARK = "<|vision_bos|><|IMAGE|><|vision_eos|>"
OMNI_IDS = {"vision_start_token_id": 6, "vision_end_token_id": 7}
"""The fourth and fifth of the tokens above; the first has id 3."""
TILED = {"size": SQUARE, "max_patches": 2}


def _flat(patch: int) -> dict[str, Any]:
    """Return options of an image processor that cuts an image of its own size into patches."""
    side = patch * 4
    return {
        "size": {"shortest_edge": side * side, "longest_edge": side * side * 9 // 4},
        "patch_size": patch,
    }


FURTHER: dict[str, Family] = {
    "janus": Family(
        {
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
        "<image_placeholder>",
        processor={"num_image_tokens": 16},
        pictures={"size": {"height": 64, "width": 64}},
    ),
    "deepseek_vl_hybrid": Family(
        {"image_token": "<image_placeholder>"},
        "<image_placeholder>",
        processor={"num_image_tokens": 16},
        pictures={"size": SQUARE, "min_size": 14, "high_res_size": {"height": 64, "width": 64}},
        config=CLIP,
    ),
    "pixtral": Family(
        {
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
        "[IMG]",
        processor={"patch_size": 14},
        pictures={"size": {"longest_edge": 56}, "patch_size": 14},
        config={
            "vision_config": {
                **{"model_type": "pixtral", "image_size": 56, "patch_size": 14, "head_dim": 16},
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        kind="llava",
    ),
    "qwen2_5_omni_thinker": Family(
        OMNI,
        OMNI_MARK,
        pictures=_flat(14),
        config={
            **OMNI_IDS,
            "text_config": {"rope_parameters": ROPE},
            "vision_config": {"window_size": 28, "fullatt_block_indexes": [1]},
        },
        parts=("Qwen2_5OmniProcessor", "Qwen2VLImageProcessorPil"),
    ),
    "qwen3_omni_moe_thinker": Family(
        OMNI,
        OMNI_MARK,
        pictures=_flat(16),
        config={**OMNI_IDS, "text_config": {"rope_parameters": ROPE}},
        parts=("Qwen3OmniMoeProcessor", "Qwen2VLImageProcessorPil"),
    ),
    "cohere2_vision": Family(
        {
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        "<|IMG_PATCH|>",
        pictures={**TILED, "patch_size": 2},
        config={**CLIP, "downsample_factor": 2},
        torchvision=True,
    ),
    "llama4": Family(
        {
            "image_token": "<|image|>",
            "start_of_image_token": "<|image_start|>",
            "end_of_image_token": "<|image_end|>",
            "patch_token": "<|patch|>",
            "tile_x_separator_token": "<|tile_x_separator|>",
            "tile_y_separator_token": "<|tile_y_separator|>",
        },
        "<|image|>",
        image="patch_token",
        processor={"patch_size": 14, "pixel_shuffle_ratio": 0.5},
        pictures=TILED,
        torchvision=True,
    ),
    "phi4_multimodal": Family(
        {"image_token": "<|endoftext10|>", "audio_token": "<|endoftext11|>"},
        "<|endoftext10|>",
        pictures={"dynamic_hd": 1},  # counts tokens as for images of 448 pixels
        config={
            "max_position_embeddings": 2048,
            "vision_config": {"image_token_id": 3, "image_size": 448, "crop_size": 448},
            "audio_config": {"audio_token_id": 4},
        },
        torchvision=True,
    ),
    "kimi_k25": Family(
        {"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"},
        "<|media_pad|>",
        pictures={"size": {"max_height": 56, "max_width": 56}, "patch_size": 14},
        torchvision=True,
    ),
    "molmo2": Family(
        {
            "image_token": "<|image|>",
            "video_token": "<|video|>",
            "image_patch_token": "<im_patch>",
            "image_col_token": "<im_col>",
            "image_start_token": "<im_start>",
            "low_res_image_start_token": "<low_res_im_start>",
            "frame_start_token": "<frame_start>",
            "image_end_token": "<im_end>",
            "frame_end_token": "<frame_end>",
            "image_low_res_token": "<im_low>",
        },
        "<|image|>",
        image="image_patch_token",
        pictures={"size": SQUARE, "max_crops": 2, "overlap_margins": [1, 1]},
        config={"vision_config": {"image_size": [56, 56], "num_position_embeddings": 16}},
        torchvision=True,
    ),
    "lfm2_vl": Family(
        {
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
        "<image>",
        pictures={
            **{"tile_size": 64, "min_image_tokens": 4, "max_image_tokens": 9},
            **{"do_image_splitting": False, "max_num_patches": 36},
        },
        torchvision=True,
    ),
}
