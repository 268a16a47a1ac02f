"""Which layers of a GGUF file get which type: llama.cpp's rules for `_S`, `_M` and `_L`.

Layers are known by their role; indices count blocks. Nothing here depends on names in the file.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ar_kernels.layouts.gguf import gguf_type
from ar_schemes import LayerPlan, Scheme, scheme

if TYPE_CHECKING:
    from collections.abc import Callable

    from ar_schemes import LayerInfo, PlanRow

PRESETS = {
    **{name: f"GGUF:{name}" for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K")},
    **{f"Q{bits}_K": f"GGUF:Q{bits}_K_S" for bits in (2, 3, 4, 5)},
}
"""GGUF type to the preset of its numbers."""
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Where the width is no multiple of 256."""
_SUPER, _BLOCK = 256, 32
_V = re.compile(r"(v_proj|qkv_proj|c_attn|query_key_value)$")
_DOWN = re.compile(r"(down_proj|fc2|dense_4h_to_h|mlp\.c_proj|\.w2)$")
_OUT = re.compile(r"(o_proj|self_attn\.dense|self_attention\.dense|attn\.c_proj)$")
_GQA = 4


def more(i: int, n: int) -> bool:
    """Tell whether block `i` of `n` is among those that get more bits: both ends, each third."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2  # noqa: PLR2004


Rule = "Callable[[int, int, int], str]"
_RULES: dict[str, tuple[str, dict[str, Callable[[int, int, int], str]]]] = {
    "Q2_K": (
        "Q2_K",
        {
            "v": lambda i, n, g: "Q4_K" if g >= _GQA else "Q3_K",
            "down": lambda i, n, g: "Q3_K",
            "out": lambda i, n, g: "Q3_K",
        },
    ),
    "Q2_K_S": (
        "Q2_K",
        {
            "v": lambda i, n, g: "Q4_K" if g >= _GQA else "Q2_K",
            "down": lambda i, n, g: "Q4_K" if i < n // 8 else "Q2_K",
        },
    ),
    "Q3_K_S": ("Q3_K", {}),
    "Q3_K_M": (
        "Q3_K",
        {
            "v": lambda i, n, g: "Q5_K" if i < 2 else "Q4_K",  # noqa: PLR2004
            "down": lambda i, n, g: "Q5_K" if i < n // 16 else "Q4_K",
            "out": lambda i, n, g: "Q4_K",
        },
    ),
    "Q3_K_L": ("Q3_K", dict.fromkeys(("v", "down", "out"), lambda i, n, g: "Q5_K")),
    "Q4_K_S": (
        "Q4_K",
        {
            "v": lambda i, n, g: "Q5_K" if i < 4 else "Q4_K",  # noqa: PLR2004
            "down": lambda i, n, g: "Q5_K" if i < n // 8 else "Q4_K",
        },
    ),
    "Q4_K_M": (
        "Q4_K",
        dict.fromkeys(("v", "down"), lambda i, n, g: "Q6_K" if more(i, n) else "Q4_K"),
    ),
    "Q5_K_S": ("Q5_K", {}),
    "Q5_K_M": (
        "Q5_K",
        dict.fromkeys(("v", "down"), lambda i, n, g: "Q6_K" if more(i, n) else "Q5_K"),
    ),
    "Q6_K": ("Q6_K", {}),
    **{name: (name, {}) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
}
FILE_TYPES = {
    **{"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11},
    **{"Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17},
    **{"Q6_K": 18, "Q2_K_S": 21, "BF16": 32},
}
"""`general.file_type` of each variant."""


def base_of(variant: str) -> str:
    """Return the type that most layers of a variant have."""
    return _RULES[variant][0]


def mixed(plan: LayerPlan, variant: str) -> LayerPlan:
    """Return the plan with the types of a variant; rows that a user's rule decided stay."""
    if variant not in _RULES:
        return plan
    blocks = list(dict.fromkeys(r.layer.block for r in plan.rows if r.layer.block is not None))
    order = {block: i for i, block in enumerate(blocks)}
    tied = any(r.layer.role == "lm_head" and r.layer.tied for r in plan.rows) or not any(
        r.layer.role == "lm_head" for r in plan.rows
    )
    ratio = _grouping(plan)

    def changed(row: PlanRow) -> PlanRow:
        wanted = _type(row.layer, variant, order, ratio, tied=tied)
        if wanted is None or row.reason.startswith(("layer_config", "ignore_layers", "role ")):
            return row
        if row.layer.block is not None and not row.quantized and row.layer.keep is not None:
            return row
        fits = fitting(wanted, row.layer.columns)
        if fits is None:
            return replace(
                row,
                scheme=Scheme(name="BF16"),
                reason=f"{row.layer.columns} columns fit no block of {wanted}: stays a float",
            )
        why = f"type mix of {variant}" if fits == wanted else f"{variant}: {wanted} needs x 256"
        return replace(row, scheme=scheme(PRESETS[fits]), reason=why)

    return LayerPlan(rows=tuple(changed(row) for row in plan.rows), default=plan.default)


def fitting(wanted: str, columns: int) -> str | None:
    """Return the type or its fallback that a width allows, or None."""
    if wanted in FALLBACK and columns % _SUPER:
        wanted = FALLBACK[wanted]
    return None if columns % _BLOCK else wanted


def _type(
    layer: LayerInfo, variant: str, order: dict[str, int], ratio: int, *, tied: bool
) -> str | None:
    base, rules = _RULES[variant]
    if layer.role in ("lm_head", "embedding"):
        if layer.tied or (layer.role == "lm_head" and tied):
            return None
        output = layer.role == "lm_head" or tied
        return ("Q8_0" if base == "Q8_0" else "Q6_K") if output else base
    if layer.block is None or layer.role not in ("linear", "experts"):
        return None
    roles = (("v", _V), ("down", _DOWN), ("out", _OUT))
    role = next((name for name, pattern in roles if pattern.search(layer.name)), "")
    rule = rules.get(role)
    return base if rule is None else rule(order[layer.block], len(order), ratio)


def _grouping(plan: LayerPlan) -> int:
    """Return how many query heads share a key-value head, from the shapes of q and k."""
    by_tail = {r.layer.name.rpartition(".")[2]: r.layer.rows for r in plan.rows}
    q, k = by_tail.get("q_proj", 1), by_tail.get("k_proj", 1)
    return max(1, q // max(1, k))


def variant_of(plan: LayerPlan, asked: str) -> str:
    """Return the variant to name in a file: the one asked for, if its type is the commonest."""
    kinds = [gguf_type(r.scheme.weight) for r in plan.quantized if r.scheme.weight is not None]
    if not kinds or asked not in _RULES or base_of(asked) in kinds:
        return asked
    most = max(set(kinds), key=kinds.count) or "F16"
    return most if most in FILE_TYPES else f"{most}_S"
