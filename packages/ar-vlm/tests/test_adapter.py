from __future__ import annotations

import pytest
import torch

from ar_tuner import AutoRound
from ar_vlm.adapter import TextDecoderAdapter, sees
from ar_vlm.plugin import ar_find_adapter

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def llava() -> torch.nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_index=127
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def gemma3() -> torch.nn.Module:
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    text = transformers.Gemma3TextConfig(**TEXT, query_pre_attn_scalar=16, sliding_window=16)
    config = transformers.Gemma3Config(
        vision_config=vision, text_config=text, mm_tokens_per_image=4, image_token_index=126,
        boi_token_index=124, eoi_token_index=125,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def test_a_text_model_gets_no_adapter() -> None:
    assert ar_find_adapter(transformers.LlamaConfig(**TEXT)) is None
    assert not sees(None)


@pytest.mark.parametrize("make", [llava, gemma3], ids=["llava", "gemma3"])
def test_the_text_decoder_is_tuned_and_the_vision_part_is_untouched(make) -> None:
    model = make()
    assert isinstance(ar_find_adapter(model.config), TextDecoderAdapter)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = torch.randint(0, 120, (8, 32), generator=torch.Generator().manual_seed(1))
    job = AutoRound(
        model, scheme="W4A16", group_size=32, dataset=rows, iters=3, nsamples=8, seqlen=32,
        batch_size=4,
    )  # fmt: skip
    quantized, plan = job.quantize()
    names = {r.layer.name for r in plan.quantized}
    assert len(names) == 14
    assert all("language_model" in n for n in names)
    changed = {k for k, v in quantized.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{n}.weight" for n in names}


def test_layers_that_look_say_why_they_stay() -> None:
    model = llava()
    adapter = TextDecoderAdapter()
    layer = model.get_submodule("model.multi_modal_projector.linear_1")
    assert "text only" in str(adapter.keep("model.multi_modal_projector.linear_1", layer))
    text = model.get_submodule("model.language_model.layers.0.mlp.up_proj")
    assert adapter.keep("model.language_model.layers.0.mlp.up_proj", text) is None
