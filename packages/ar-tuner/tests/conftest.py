from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(t: Any) -> Any:
    return t.LlamaForCausalLM(t.LlamaConfig(**SMALL))


def qwen3(t: Any) -> Any:
    return t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True))


def gemma2(t: Any) -> Any:
    config = t.Gemma2Config(**SMALL, head_dim=16, sliding_window=8, query_pre_attn_scalar=16)
    return t.Gemma2ForCausalLM(config)


def gpt2(t: Any) -> Any:
    config = t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return t.GPT2LMHeadModel(config)


def qwen3_moe(t: Any) -> Any:
    experts = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**SMALL, head_dim=16, **experts))


def mistral(t: Any) -> Any:
    return t.MistralForCausalLM(t.MistralConfig(**SMALL, sliding_window=8))


MODELS = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "mistral": mistral,
    "qwen3_moe": qwen3_moe,
}


@pytest.fixture
def model() -> Callable[[str], Any]:
    """Make a tiny random model by its type's name."""

    def make(kind: str = "llama") -> Any:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        return MODELS[kind](transformers).eval().requires_grad_(requires_grad=False)

    return make


@pytest.fixture
def rows() -> torch.Tensor:
    """Token rows [8, 32]."""
    return torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(1))


class Words:
    """A tokenizer in the manner of transformers: one id per word, its length; 99 before a text."""

    eos_token_id = 0
    chat_template: str | None = None

    def __init__(self, *, begins: bool = False, template: str | None = None) -> None:
        self.begins, self.chat_template = begins, template
        self.calls = 0

    def __call__(
        self, texts: list[str], *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Any:
        self.calls += 1
        before = [99] if self.begins and add_special_tokens else []
        ids = [before + [99 if w == "<s>" else len(w) for w in text.split()] for text in texts]
        return type("Encoded", (), {"input_ids": ids})()

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Refuse what strict templates refuse, by the name of the template."""
        assert not tokenize
        roles = [m["role"] for m in messages]
        if self.chat_template == "no system" and "system" in roles:
            msg = "System role not supported"
            raise ValueError(msg)
        if roles[-2:] == ["user", "user"]:
            msg = "roles must alternate"
            raise ValueError(msg)
        said = [f"{m['role']}: {m['content']}" for m in messages]
        return " ".join(["<s>", *said, *(["assistant:"] if add_generation_prompt else [])])


@pytest.fixture
def words() -> type[Words]:
    """Make a tokenizer of words."""
    return Words
