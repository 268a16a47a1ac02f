"""Names of vision towers and projectors: of Transformers' checkpoints, and of llama.cpp.

One table a tower; nothing is computed here. Facts follow the loader of libmtmd.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

SPLIT = ("attn_q", "attn_k", "attn_v")
"""What a fused qkv becomes where the loader wants three."""


@dataclass(frozen=True)
class Tower:
    """Names of one kind of tower and projector.

    Attributes:
        prefix: pattern of what the names of its tensors begin with.
        block: pattern of a block inside it, with its number as a group.
        layers: names inside a block; a tuple stands for that many equal parts.
        top: names outside the blocks.
        whole: full tensor names, suffix included, where it is not kept; in blocks, too.
        permuted: rows of q and k are reordered for ggml's rope (pairs interleaved).
        offsets: tensors to which a number is added.
        half: tensors that the loader wants in half precision.
    """

    prefix: str
    block: str
    layers: Mapping[str, str | tuple[str, ...]]
    top: Mapping[str, str]
    whole: Mapping[str, str] = field(default_factory=dict)
    permuted: bool = False
    offsets: Mapping[str, float] = field(default_factory=dict)
    half: tuple[str, ...] = ()

    def names_of(self, key: str) -> tuple[str, ...] | None:
        """Return the names of a tensor of the checkpoint in the file.

        Several where it is written in equal parts along its rows; none at all where there is no
        place for it; None where it does not belong to the tower.
        """
        found = re.match(self.prefix, key)
        if found is None:
            return None
        inside = key[found.end() :]
        if inside in self.whole:
            return (self.whole[inside],)
        bare = re.fullmatch(rf"{self.block}\.(\d+)\.(\w+)", inside)
        if bare is not None and bare[2] in self.whole:
            return (f"v.blk.{bare[1]}.{self.whole[bare[2]]}",)
        stem, _, suffix = inside.rpartition(".")
        if stem in self.top:
            return (f"{self.top[stem]}.{suffix}",)
        block = re.fullmatch(rf"{self.block}\.(\d+)\.(.+)", stem)
        target = None if block is None else self.layers.get(block[2])
        if block is None or target is None:
            return ()
        parts = (target,) if isinstance(target, str) else target
        return tuple(f"v.blk.{block[1]}.{part}.{suffix}" for part in parts)


_TOWER = r"(model\.)?vision_tower\.(vision_model\.)?|(model\.)?(?=multi_modal_projector\.)"
_VIT = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_VIT_TOP = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
}
CLIP = Tower(
    _TOWER,
    r"encoder\.layers",
    _VIT,
    _VIT_TOP
    | {
        "pre_layrnorm": "v.pre_ln",
        "multi_modal_projector.linear_1": "mm.0",
        "multi_modal_projector.linear_2": "mm.2",
    },
    {"embeddings.class_embedding": "v.class_embd"},
)
SIGLIP_GEMMA = Tower(
    _TOWER,
    r"encoder\.layers",
    _VIT,
    _VIT_TOP
    | {
        "post_layernorm": "v.post_ln",
        "multi_modal_projector.mm_soft_emb_norm": "mm.soft_emb_norm",
    },
    {"multi_modal_projector.mm_input_projection_weight": "mm.input_projection.weight"},
    offsets={"mm.soft_emb_norm.weight": 1.0},
    half=("mm.input_projection.weight",),
)
IDEFICS = Tower(
    r"(model\.)?vision_model\.|(model\.)?(?=connector\.)",
    r"encoder\.layers",
    _VIT,
    _VIT_TOP
    | {
        "post_layernorm": "v.post_ln",
        "connector.modality_projection.proj": "mm.model.fc",
    },
)
PIXTRAL = Tower(
    rf"{_TOWER}|(model\.)?(?=patch_merger\.)",
    r"transformer\.layers",
    {
        "attention_norm": "ln1",
        "ffn_norm": "ln2",
        "attention.q_proj": "attn_q",
        "attention.k_proj": "attn_k",
        "attention.v_proj": "attn_v",
        "attention.o_proj": "attn_out",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    },
    {
        "patch_conv": "v.patch_embd",
        "ln_pre": "v.pre_ln",
        "multi_modal_projector.linear_1": "mm.1",
        "multi_modal_projector.linear_2": "mm.2",
        "multi_modal_projector.norm": "mm.input_norm",
        "multi_modal_projector.patch_merger.merging_layer": "mm.patch_merger",
    },
    permuted=True,
)
INTERN = Tower(
    _TOWER,
    r"encoder\.layer",
    {
        "layernorm_before": "ln1",
        "layernorm_after": "ln2",
        "attention.q_proj": "attn_q",
        "attention.k_proj": "attn_k",
        "attention.v_proj": "attn_v",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
        "attention.projection_layer": "attn_out",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    },
    {
        "embeddings.patch_embeddings.projection": "v.patch_embd",
        "multi_modal_projector.layer_norm": "mm.model.mlp.0",
        "multi_modal_projector.linear_1": "mm.model.mlp.1",
        "multi_modal_projector.linear_2": "mm.model.mlp.3",
    },
    {
        "lambda_1": "ls1.weight",
        "lambda_2": "ls2.weight",
        "embeddings.cls_token": "v.class_embd",
        "embeddings.position_embeddings": "v.position_embd.weight",
    },
)
QWEN2 = Tower(
    r"(model\.)?visual\.",
    r"blocks",
    {
        "norm1": "ln1",
        "norm2": "ln2",
        "attn.qkv": SPLIT,
        "attn.proj": "attn_out",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    {
        "patch_embed.proj": "v.patch_embd",
        "merger.ln_q": "v.post_ln",
        "merger.mlp.0": "mm.0",
        "merger.mlp.2": "mm.2",
    },
)
QWEN3 = Tower(
    r"(model\.)?visual\.",
    r"blocks",
    {
        "norm1": "ln1",
        "norm2": "ln2",
        "attn.qkv": "attn_qkv",
        "attn.proj": "attn_out",
        "mlp.linear_fc1": "ffn_up",
        "mlp.linear_fc2": "ffn_down",
    },
    {
        "patch_embed.proj": "v.patch_embd",
        "pos_embed": "v.position_embd",
        "merger.norm": "v.post_ln",
        "merger.linear_fc1": "mm.0",
        "merger.linear_fc2": "mm.2",
    },
)
