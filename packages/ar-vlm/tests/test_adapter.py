from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from ar_tuner import AutoRound
from ar_tuner.registry import host
from ar_vlm import VisionLanguageAdapter, VlmError, plugin
from ar_vlm.adapter import NEEDS_IMAGES, sees, silent_blocks

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "intermediate_size": 64,
}
QWEN_TOKENS = {
    "image_token_id": 120,
    "video_token_id": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def llava() -> torch.nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=127,
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma3() -> torch.nn.Module:
    text = transformers.Gemma3TextConfig(**TEXT, query_pre_attn_scalar=16, sliding_window=16)
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION),
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=126,
        boi_token_index=124,
        eoi_token_index=125,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_5_vl() -> torch.nn.Module:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": SECTIONS},
        vision_config={**QWEN_VISION, "window_size": 28, "fullatt_block_indexes": [1]},
        **QWEN_TOKENS,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> torch.nn.Module:
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": SECTIONS},
        vision_config={**QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
        **QWEN_TOKENS,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def mllama() -> torch.nn.Module:
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    vision = {
        "hidden_size": 32,
        "attention_heads": 2,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "intermediate_size": 64,
        "vision_output_dim": 96,
        "image_size": 28,
        "patch_size": 14,
        "intermediate_layers_indices": [0, 1],
        "supported_aspect_ratios": [[1, 1]],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.MllamaConfig(
        text_config={**text, "rope_parameters": rope}, vision_config=vision, image_token_index=120
    )
    return transformers.MllamaForConditionalGeneration(config)


MODELS = [llava, gemma3, qwen2_5_vl, qwen3_vl, mllama]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our plugin, known to ar-tuner whether or not its entry point is installed."""
    if not any(r.name == "ar_vlm" and r.status == "ok" for r in _loaded().records):
        host()._register("ar_vlm", plugin, "ar-vlm", "0")


def _loaded():
    host().load()
    return host()


def build(make) -> torch.nn.Module:
    torch.manual_seed(0)
    return make().eval()


def rows() -> torch.Tensor:
    return torch.randint(3, 110, (8, 32), generator=torch.Generator().manual_seed(1))


def job(model: torch.nn.Module, **options: object) -> AutoRound:
    sizes = {"nsamples": 8, "seqlen": 32, "batch_size": 4, "iters": 3}
    return AutoRound(model, scheme="W4A16", group_size=32, dataset=rows(), **{**sizes, **options})


class Letters:
    """A tokenizer in the manner of transformers: one id per letter."""

    eos_token_id = 2

    def __call__(
        self, texts: list[str], *, add_special_tokens: bool = True, verbose: bool = True
    ) -> SimpleNamespace:
        before = [1] if add_special_tokens else []
        return SimpleNamespace(input_ids=[[*before, *map(ord, text)] for text in texts])


def test_a_vision_language_model_is_calibrated_with_a_local_file(tmp_path) -> None:
    lines = [json.dumps({"text": "xyz" * i + "abc " * 9}) for i in range(1, 9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    seen: list[Any] = []
    sizes = {"nsamples": 2, "seqlen": 32, "batch_size": 2, "iters": 1, "group_size": 32}
    sizes["distill"] = False
    made = build(llava)
    path = str(tmp_path / "a.jsonl")
    AutoRound(made, Letters(), dataset=path, on_event=seen.append, **sizes).quantize()
    ready = next(event for event in seen if event.kind == "calibration_ready")
    assert ready.sources == ((path, 2),)


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_the_text_decoder_is_tuned_and_the_vision_part_is_untouched(make) -> None:
    model = build(make)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quantized, plan = job(model).quantize()
    names = {r.layer.name for r in plan.quantized}
    assert len(names) == 14
    assert all(name.startswith("model.language_model.layers.") for name in names)
    changed = {k for k, v in quantized.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{n}.weight" for n in names}


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_tuning_hurts_the_answers_less_than_rounding(make) -> None:
    def error(**options: object) -> float:
        model = build(make)
        with torch.no_grad():
            reference = model(input_ids=rows()).logits
            quantized, _ = job(model, bits=2, **options).quantize()
            return float((quantized(input_ids=rows()).logits - reference).square().mean())

    assert error(iters=60) < error(recipe="rtn", iters=0)


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_hook_ar_find_adapter_answers_for_models_that_see(make) -> None:
    assert isinstance(plugin.ar_find_adapter(build(make).config), VisionLanguageAdapter)


@pytest.mark.parametrize("config", [None, transformers.LlamaConfig(**TEXT)], ids=["none", "text"])
def test_everything_else_gets_no_adapter(config) -> None:
    assert plugin.ar_find_adapter(config) is None
    assert not sees(config)


def test_blocks_that_attend_to_images_stay_with_the_reason() -> None:
    model = build(mllama)
    assert silent_blocks(model.config) == {1}
    silent = [r for r in job(model).plan().rows if r.layer.name.startswith("model.language")]
    reasons = {r.layer.block: r.reason for r in silent if not r.quantized and r.layer.block}
    assert set(reasons) == {"model.language_model.layers.1"}
    assert "never run on text" in reasons["model.language_model.layers.1"]


def test_layers_that_look_say_why_they_stay() -> None:
    model = build(llava)
    adapter = VisionLanguageAdapter()
    layer = model.get_submodule("model.multi_modal_projector.linear_1")
    assert "quant_nontext_module is off" in str(
        adapter.keep("model.multi_modal_projector.linear_1", layer)
    )
    text = model.get_submodule("model.language_model.layers.0.mlp.up_proj")
    assert adapter.keep("model.language_model.layers.0.mlp.up_proj", text) is None


def test_a_model_that_demands_images_is_refused_for_tuning_and_not_for_rounding() -> None:
    assert "blip-2" in NEEDS_IMAGES
    model = build(llava)
    model.config.model_type = "blip-2"
    with pytest.raises(VlmError, match="'blip-2' does not run without images.*recipe 'rtn'"):
        job(model).quantize()
    _, plan = job(model, recipe="rtn", iters=0).quantize()
    assert plan.quantized
