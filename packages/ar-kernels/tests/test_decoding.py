"""Float parts of a loaded model that are replaced for decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from ar_kernels.hf import decoding
from ar_kernels.native import library, steps
from ar_kernels.native.modules import NativeLinear, NativeNorm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    library.missing() is not None, reason="the native library is not built"
)


def tiny(**changes: Any) -> LlamaForCausalLM:
    """Return a model with heads of 16 and grouped keys."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    config = LlamaConfig(**{**shape, **heads, "tie_word_embeddings": True, **changes})
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (LlamaRMSNorm, steps.ROUNDS_FIRST),
        (Gemma2RMSNorm, steps.ADDS_ONE),
        (Olmo2RMSNorm, steps.PLAIN),
    ],
)
def test_the_form_of_a_norm_is_found(kind: type, form: int, dtype: torch.dtype) -> None:
    found = decoding.norm_form(kind(64, eps=1e-5).to(dtype), 1e-5)
    if dtype == torch.float32 and form == steps.PLAIN:
        form = steps.ROUNDS_FIRST  # the same where nothing is rounded
    assert found == form


def test_a_norm_that_does_something_else_stays() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 2

    class GatedRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor, gate: Any = None) -> torch.Tensor:
            return super().forward(hidden_states)

    model = nn.ModuleList([OddRMSNorm(32), GatedRMSNorm(32), LlamaRMSNorm(24), LlamaRMSNorm(32)])
    assert decoding.speed_up(model) == {"norms": 1}
    assert [type(m) for m in model] == [OddRMSNorm, GatedRMSNorm, LlamaRMSNorm, NativeNorm]


def test_the_model_writes_as_before() -> None:
    model = tiny()
    ids = torch.randint(0, 128, (2, 7))
    before = model.generate(ids, max_new_tokens=8, do_sample=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = decoding.speed_up(model)
    assert done == {"norms": 5, "float layers": 15, "attention": 1}
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_padded_prompts_and_static_caches_agree_with_sdpa() -> None:
    ids = torch.randint(0, 128, (2, 7))
    seen = torch.ones_like(ids)
    seen[1, :3] = 0
    for options in ({}, {"cache_implementation": "static"}):
        plain, ours = tiny(), tiny()
        decoding.speed_up(ours)
        texts = [
            m.generate(
                ids, attention_mask=seen, max_new_tokens=6, do_sample=False, output_logits=True,
                return_dict_in_generate=True, **options,
            )
            for m in (plain, ours)
        ]  # fmt: skip
        for a, b in zip(*(t.logits for t in texts), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_saved_model_does_not_name_our_attention(tmp_path: Path) -> None:
    model = tiny()
    decoding.speed_up(model)
    assert model.config._attn_implementation == "ar_native"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert not any(isinstance(m, NativeLinear) for m in again.modules())


def test_eager_attention_stays() -> None:
    model = tiny(attn_implementation="eager")
    assert "attention" not in decoding.speed_up(model)
    assert model.config._attn_implementation == "eager"


def test_plain_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(decoding.ENV, "plain")
    assert decoding.speed_up(tiny()) == {}


def test_a_compiled_model_is_one_graph() -> None:
    model = tiny()
    decoding.speed_up(model)
    ids = torch.randint(0, 128, (1, 1))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5)
