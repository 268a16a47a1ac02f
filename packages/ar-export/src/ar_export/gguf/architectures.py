"""What llama.cpp must be told of each architecture: names, row orders, offsets, metadata.

One row of a table each; nothing is computed here. Facts follow llama.cpp's loaders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ar_export.errors import ExportError
from ar_schemes import unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping

_LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMED = _LLAMA | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA2 = _NORMED | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OLMO2 = {k: v for k, v in _NORMED.items() if k != "input_layernorm"} | {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_SHARED = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_MIXTRAL = _LLAMA | {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
}
_PHI3 = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PHI2 = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_STARCODER2 = {k: v for k, v in _LLAMA.items() if not k.startswith("mlp")} | {
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_FALCON = {
    "input_layernorm": "attn_norm",
    "ln_attn": "attn_norm_2",
    "ln_mlp": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Architecture:
    """Facts of one architecture.

    Attributes:
        name: `general.architecture`.
        layers: name inside a block to the name there; experts without their number.
        top: names outside the blocks.
        blocks: prefix of the numbered blocks.
        permuted: rows of q and k are reordered for ggml's rope (pairs interleaved).
        qkv_grouped: rows of the fused q, k, v come per key-value group and are sorted.
        norm_offset: is added to the weights of norms.
        conv1d: linear weights of the source are stored transposed.
        layer_norm: LayerNorm instead of RMSNorm.
        facts: further metadata: key after the prefix to the config's key, or a constant.
    """

    name: str
    layers: Mapping[str, str]
    top: Mapping[str, str] = field(default_factory=lambda: dict(_TOP))
    blocks: str = "model.layers"
    permuted: bool = False
    qkv_grouped: bool = False
    norm_offset: float = 0.0
    conv1d: bool = False
    layer_norm: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def name_of(self, key: str) -> tuple[str, int | None] | None:
        """Return (GGUF name, expert) of a tensor of the checkpoint, or None: not wanted there.

        Raises:
            ExportError: a weight that this architecture has no name for.
        """
        stem, _, suffix = key.rpartition(".")
        if stem in self.top and suffix in ("weight", "bias"):
            return f"{self.top[stem]}.{suffix}", None
        found = re.fullmatch(rf"{re.escape(self.blocks)}\.(\d+)\.(.+)", stem)
        if found is None or suffix not in ("weight", "bias"):
            if _UNUSED.search(key):
                return None
            raise ExportError(self._strange(key))
        index, inside = found[1], found[2]
        expert = re.fullmatch(r"(.*experts)\.(\d+)\.(.+)", inside)
        number = int(expert[2]) if expert else None
        inside = f"{expert[1]}.{expert[3]}" if expert else inside
        if inside not in self.layers:
            if _UNUSED.search(key):
                return None
            raise ExportError(self._strange(key))
        return f"blk.{index}.{self.layers[inside]}.{suffix}", number

    def key_of(self, name: str) -> str:
        """Return the checkpoint's name of a tensor of a GGUF file (the inverse of `name_of`)."""
        stem, _, suffix = name.rpartition(".")
        for ours, theirs in self.top.items():
            if stem == theirs:
                return f"{ours}.{suffix}"
        found = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        if found is not None:
            for ours, theirs in self.layers.items():
                if found[2] == theirs:
                    return f"{self.blocks}.{found[1]}.{ours}.{suffix}"
        return name

    def _strange(self, key: str) -> str:
        return f"llama.cpp's architecture {self.name!r} has no tensor for {key}"


_UNUSED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$")
_MOE = {"expert_feed_forward_length": "moe_intermediate_size"}
_DEEPSTACK = {"n_deepstack_layers": "n_deepstack_layers"}
_GPT2_TOP = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
}

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", _LLAMA, permuted=True),
    "MistralForCausalLM": Architecture("llama", _LLAMA, permuted=True),
    "MixtralForCausalLM": Architecture("llama", _MIXTRAL, permuted=True),
    "Qwen2ForCausalLM": Architecture("qwen2", _LLAMA),
    "Qwen3ForCausalLM": Architecture("qwen3", _NORMED),
    "Qwen2MoeForCausalLM": Architecture(
        "qwen2moe",
        _LLAMA | _EXPERTS | _SHARED,
        facts=_MOE | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe", _NORMED | _EXPERTS, facts=_MOE),
    "Qwen2VLForConditionalGeneration": Architecture("qwen2vl", _LLAMA),
    "Qwen2_5_VLForConditionalGeneration": Architecture("qwen2vl", _LLAMA),
    "Qwen3VLForConditionalGeneration": Architecture("qwen3vl", _NORMED, facts=_DEEPSTACK),
    "GemmaForCausalLM": Architecture("gemma", _LLAMA, norm_offset=1.0),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        _GEMMA2,
        norm_offset=1.0,
        facts={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
        },
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3", _GEMMA2, norm_offset=1.0, facts={"attention.sliding_window": "sliding_window"}
    ),
    "PhiForCausalLM": Architecture(
        "phi2",
        _PHI2,
        top={
            "model.embed_tokens": "token_embd",
            "model.final_layernorm": "output_norm",
            "lm_head": "output",
        },
        layer_norm=True,
    ),
    "Phi3ForCausalLM": Architecture(
        "phi3", _PHI3, facts={"attention.sliding_window": "sliding_window"}
    ),
    "GPT2LMHeadModel": Architecture(
        "gpt2", _GPT2, top=_GPT2_TOP, blocks="transformer.h", conv1d=True, layer_norm=True
    ),
    "FalconForCausalLM": Architecture(
        "falcon",
        _FALCON,
        top={
            "transformer.word_embeddings": "token_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
        },
        blocks="transformer.h",
        qkv_grouped=True,
        layer_norm=True,
    ),
    "Starcoder2ForCausalLM": Architecture("starcoder2", _STARCODER2, layer_norm=True),
    "StableLmForCausalLM": Architecture("stablelm", _LLAMA, layer_norm=True),
    "Olmo2ForCausalLM": Architecture("olmo2", _OLMO2),
    "GraniteForCausalLM": Architecture(
        "granite",
        _LLAMA,
        permuted=True,
        facts={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "SmolLM3ForCausalLM": Architecture("smollm3", _LLAMA, permuted=True),
}
"""Model class to its facts."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a model's configuration.

    Raises:
        ExportError: llama.cpp has no loader for it, or none that is written for here.
    """
    names = [str(n) for n in config.get("architectures") or ()]
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    named = names[0] if names else str(config.get("model_type"))
    raise ExportError(unknown_name("GGUF architecture", named, ARCHITECTURES))
