from __future__ import annotations

import importlib.metadata
import sys
import types
from typing import TYPE_CHECKING, Any

import pluggy
import pytest
import torch

from ar_kernels import data_type
from ar_schemes import PluginHost, scheme
from ar_tuner import builtin, hookspecs, registry
from ar_tuner.adapters import GenericAdapter
from ar_tuner.auto_scheme.candidates import Inputs, Maker
from ar_tuner.auto_scheme.scorers import ScoreTask
from ar_tuner.blocks import find_blocks, layers_of, weights_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(t: Any, **changes: Any) -> Any:
    return t.LlamaForCausalLM(t.LlamaConfig(**{**SMALL, **changes}))


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


def mixtral(t: Any, **changes: Any) -> Any:
    return t.MixtralForCausalLM(t.MixtralConfig(**{**SMALL, "num_local_experts": 4, **changes}))


def gpt_oss(t: Any) -> Any:
    more = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    return t.GptOssForCausalLM(t.GptOssConfig(**SMALL, **more))


def llama4(t: Any) -> Any:
    more = {"head_dim": 16, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1}
    return t.Llama4ForCausalLM(t.Llama4TextConfig(**SMALL, **more, **experts))


def deepseek_v3(t: Any) -> Any:
    heads = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16}
    heads |= {"qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    experts |= {"moe_intermediate_size": 64, "first_k_dense_replace": 1}
    sizes = {**SMALL, "num_key_value_heads": 4, **heads, **experts}
    return t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**sizes))


def qwen3_next(t: Any) -> Any:
    experts = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    kinds = ["linear_attention", "full_attention"]
    more = {"head_dim": 16, "shared_expert_intermediate_size": 64, "layer_types": kinds}
    return t.Qwen3NextForCausalLM(t.Qwen3NextConfig(**SMALL, **experts, **linear, **more))


def jetmoe(t: Any) -> Any:
    sizes = {k: v for k, v in SMALL.items() if k not in ("num_attention_heads",)}
    more = {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    return t.JetMoeForCausalLM(t.JetMoeConfig(**sizes, **more))


def mistral(t: Any) -> Any:
    return t.MistralForCausalLM(t.MistralConfig(**SMALL, sliding_window=8))


MODELS = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "mistral": mistral,
    "qwen3_moe": qwen3_moe,
    "jetmoe": jetmoe,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
    "deepseek_v3": deepseek_v3,
    "qwen3_next": qwen3_next,
}
"""Tiny models by type; from qwen3_moe on they have fused experts, in all their layouts."""


@pytest.fixture
def model() -> Callable[[str], Any]:
    """Make a tiny random model by its type's name; a llama may have other numbers."""

    def make(kind: str = "llama", **changes: Any) -> Any:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        made = MODELS[kind](transformers, **changes)
        return made.eval().requires_grad_(requires_grad=False)

    return make


@pytest.fixture
def rows() -> torch.Tensor:
    """Token rows [8, 32]."""
    return torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(1))


class Memory:
    """A sink that keeps what it is given."""

    def __init__(self, request) -> None:
        self.request = request
        self.weights, self.tensors, self.state = {}, {}, "open"

    def put(self, name, weight) -> None:
        self.weights[name] = weight

    def put_tensor(self, name, tensor) -> None:
        self.tensors[name] = tensor

    def commit(self) -> Path:
        self.state = "committed"
        self.request.output.mkdir()
        return self.request.output

    def abort(self) -> None:
        self.state = "aborted"


@pytest.fixture
def sinks(monkeypatch):
    """Register a format `memory` through the hook; return the sinks it opens."""
    opened = []
    plugin = types.ModuleType("memory_plugin")

    def ar_open_sink(request):
        if request.format != "memory":
            return None
        opened.append(Memory(request))
        return opened[-1]

    ar_open_sink.__module__ = "memory_plugin"
    plugin.ar_open_sink = pluggy.HookimplMarker("ar_tuner")(ar_open_sink)
    monkeypatch.setitem(sys.modules, "memory_plugin", plugin)
    entry = importlib.metadata.EntryPoint("memory", "memory_plugin", "ar_tuner")
    host = PluginHost(
        "ar_tuner", hookspecs, builtins={"builtin": builtin}, env={}, entry_points=[entry]
    )
    monkeypatch.setattr(registry, "host", lambda: host)
    return opened


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


class Oracle:
    """What a scorer is given, and slow ways to what it should find."""

    OPTIONS = ("W2A16G32", "W4A16G32")

    def task(self, model: Any, rows: torch.Tensor, options: Any = None, **changes: Any) -> Any:
        """Return the task of a model: the linear layers of its blocks and those in `ends`."""
        adapter = GenericAdapter()
        discovery = find_blocks(model, adapter)
        ends = changes.pop("ends", ())
        layers = {
            la.name: la
            for la in layers_of(model, discovery, adapter)
            if (la.block is not None and la.role == "linear") or la.name in ends
        }
        return ScoreTask(
            **{
                "model": model,
                "adapter": adapter,
                "blocks": discovery.blocks,
                "layers": layers,
                "open_to": dict.fromkeys(layers, options or {n: scheme(n) for n in self.OPTIONS}),
                "rows": rows,
                "batch_size": 1,
                "seed": 3,
                "by_block": True,
                "maker": Maker(),
            }
            | changes
        )

    def energies(self, task: Any) -> dict[str, Any]:
        """Return the mean squares of all inputs."""
        inputs = Inputs()
        for block in task.blocks:
            refs = weights_of(block, list(task.layers))
            with inputs.gathered(block.module, refs), torch.no_grad():
                for row in task.rows:
                    task.model(row[None])
        return {layer: inputs.energy(layer) for layer in inputs.squares}

    def left(self, weight: torch.Tensor, which: Any, energy: Any) -> torch.Tensor:
        """Return what an option leaves of a weight."""
        kind = data_type(which.weight.data_type)
        params = kind.search(weight, which.weight, importance=energy)
        return kind.fake_quant(weight, which.weight, params)


@pytest.fixture
def oracle() -> Oracle:
    """Make tasks and what they should give."""
    return Oracle()
