"""The families of small models: tokens, processor options, configuration of each."""

from __future__ import annotations

from ar_vlm.testing.family import CLIP, ROPE, SQUARE, Family
from ar_vlm.testing.further import FURTHER

LOCAL = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
}
QWEN_EYES = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
QWEN25_EYES = {
    **{"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
    **{"intermediate_size": 64, "window_size": 28, "fullatt_block_indexes": [1]},
}
QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_SIZE = {"size": {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}, "patch_size": 14}
QWEN3_SIZE = {"size": {"shortest_edge": 64 * 64, "longest_edge": 96 * 96}, "patch_size": 16}
IDEFICS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_tag": "<global-img>",
}
UNSPLIT = {
    "size": {"longest_edge": 56},
    "max_image_size": {"longest_edge": 56},
    "do_image_splitting": False,
}
CROP = {"size": {"shortest_edge": 56}, "crop_size": SQUARE}
SELECT = {"patch_size": 14, "vision_feature_select_strategy": "default"}
WHOLE = {"size": SQUARE, "max_patches": 1, "crop_to_patches": False}

FAMILIES: dict[str, Family] = {
    "llava": Family(
        {"image_token": "<image>"},
        "<image>",
        processor={**SELECT, "num_additional_image_tokens": 1},
        pictures=CROP,
        config=CLIP,
    ),
    "llava_next": Family(
        {"image_token": "<image>"},
        "<image>",
        processor={**SELECT, "num_additional_image_tokens": 1},
        pictures={**CROP, "image_grid_pinpoints": [[56, 112], [112, 56]]},
        config={**CLIP, "image_grid_pinpoints": [[56, 112], [112, 56]]},
    ),
    "qwen2_vl": Family(
        QWEN,
        QWEN_MARK,
        pictures=QWEN_SIZE,
        config={"text_config": {"rope_parameters": ROPE}, "vision_config": QWEN_EYES},
    ),
    "qwen2_5_vl": Family(
        QWEN,
        QWEN_MARK,
        pictures=QWEN_SIZE,
        config={"text_config": {"rope_parameters": ROPE}, "vision_config": QWEN25_EYES},
    ),
    "qwen3_vl": Family(
        QWEN,
        QWEN_MARK,
        pictures=QWEN3_SIZE,
        config={
            "text_config": {"rope_parameters": ROPE},
            "vision_config": {"deepstack_visual_indexes": [0, 1]},
        },
    ),
    "qwen3_vl_moe": Family(
        QWEN,
        QWEN_MARK,
        pictures=QWEN3_SIZE,
        config={
            "text_config": {"rope_parameters": ROPE},
            "vision_config": {"deepstack_visual_indexes": [0, 1]},
        },
    ),
    "gemma3": Family(
        {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        "<start_of_image>",
        processor={"image_seq_length": 4},
        pictures={"size": SQUARE},
        config={"mm_tokens_per_image": 4, **CLIP, "text_config": LOCAL},
    ),
    "internvl": Family(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        "<IMG_CONTEXT>",
        image="context_image_token",
        processor={"image_seq_length": 4},
        pictures=WHOLE,
        config={"vision_config": {"image_size": [56, 56], "patch_size": [14, 14]}},
    ),
    "mistral3": Family(
        {
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
        "[IMG]",
        processor={"patch_size": 14, "spatial_merge_size": 2},
        pictures={"size": {"longest_edge": 56}, "patch_size": 14},
        config={"vision_config": {"image_size": 56, "patch_size": 14, "head_dim": 16}},
    ),
    "idefics3": Family(
        IDEFICS,
        "<image>",
        processor={"image_seq_len": 4},
        pictures=UNSPLIT,
        config=CLIP,
    ),
    "smolvlm": Family(
        {
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
        "<image>",
        processor={"image_seq_len": 4},
        pictures=UNSPLIT,
        config=CLIP,
    ),
    "llava_onevision": Family(
        {"image_token": "<image>", "video_token": "<video>"},
        "<image>",
        processor={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        pictures={"size": SQUARE, "image_grid_pinpoints": [[56, 112], [112, 56]]},
        config={**CLIP, "image_grid_pinpoints": [[56, 112], [112, 56]]},
    ),
    "gemma4": Family(
        {
            "boi_token": "<boi>",
            "eoi_token": "<eoi>",
            "image_token": "<|image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<boa>",
            "eoa_token": "<eoa>",
            "video_token": "<|video|>",
        },
        "<|image|>",
        processor={"image_seq_length": 4},
        pictures={"patch_size": 16, "pooling_kernel_size": 3, "max_soft_tokens": 70},
        config={
            "text_config": {
                "layer_types": LOCAL["layer_types"],
                "num_kv_shared_layers": 2,
                "global_head_dim": 32,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 352,
            },
            "vision_config": {"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2},
        },
    ),
    "deepseek_vl": Family(
        {"image_token": "<image_placeholder>"},
        "<image_placeholder>",
        processor={"num_image_tokens": 16},
        pictures={"size": SQUARE, "min_size": 14},
        config=CLIP,
    ),
    "mllama": Family(
        {"image_token": "<|image|>", "python_token": "<|python_tag|>"},
        "<|image|>",
        pictures={"size": {"height": 28, "width": 28}, "max_image_tiles": 4},
        config={
            "text_config": {"cross_attention_layers": [1]},
            "vision_config": {
                "intermediate_layers_indices": [0, 1],
                "image_size": 28,
                "vision_output_dim": 96,
                "num_global_layers": 1,
            },
        },
    ),
    "aya_vision": Family(
        {
            "image_token": "<image>",
            "start_of_img_token": "<|START_OF_IMG|>",
            "end_of_img_token": "<|END_OF_IMG|>",
            "img_patch_token": "<|IMG_PATCH|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
            "tile_token": "TILE",
            "tile_global_token": "TILE_GLOBAL",
        },
        "<image>",
        image="img_patch_token",
        processor={"patch_size": 14, "img_size": 56, "downsample_factor": 2},
        pictures=WHOLE,
        config={**CLIP, "downsample_factor": 2},
    ),
    "glm4v": Family(
        {
            "image_token": "<|image|>",
            "video_token": "<|video|>",
            "image_start_token": "<|begin_of_image|>",
            "image_end_token": "<|end_of_image|>",
        },
        "<|begin_of_image|><|image|><|end_of_image|>",
        pictures=QWEN_SIZE,
        config={"text_config": {"rope_parameters": ROPE}, "vision_config": {"image_size": 56}},
    ),
    "paligemma": Family(
        {"image_token": "<image>"},
        "<image>",
        pictures={"size": SQUARE, "image_seq_length": 16},
        config={**CLIP, "projection_dim": 64},
    ),
    **FURTHER,
}
