"""The presets as data: one row per named scheme. Adding one is adding a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ar_schemes.scheme import Scheme, scheme_from_dict

_INT: dict[str, dict[str, Any]] = {
    f"W{bits}A16{'' if size == 128 else f'G{size}'}": {"bits": bits, "group_size": size}
    for bits in range(2, 9)
    for size in (128, 64, 32)
}


def _acts(bits: int, size: int, data_type: str, *, dynamic: bool = True) -> dict[str, Any]:
    return {
        "act_bits": bits,
        "act_group_size": size,
        "act_sym": True,
        "act_data_type": data_type,
        "act_dynamic": dynamic,
    }


def _weight(bits: int, size: int | list[int], data_type: str) -> dict[str, Any]:
    return {"bits": bits, "group_size": size, "sym": True, "data_type": data_type}


_FLOAT: dict[str, dict[str, Any]] = {
    "MXFP4": _weight(4, 32, "mx_fp") | _acts(4, 32, "mx_fp"),
    "MXFP6": _weight(6, 32, "mx_fp") | _acts(6, 32, "mx_fp"),
    "MXFP8": _weight(8, 32, "mx_fp") | _acts(8, 32, "mx_fp"),
    "MXFP4_RCEIL": _weight(4, 32, "mx_fp") | _acts(4, 32, "mx_fp_rceil"),
    "MXFP8_RCEIL": _weight(8, 32, "mx_fp") | _acts(8, 32, "mx_fp_rceil"),
    "MXINT4": _weight(4, 32, "mx_int") | _acts(4, 32, "mx_int"),
    "NVFP4": _weight(4, 16, "nv_fp") | _acts(4, 16, "nv_fp4_with_static_gs"),
    "NVFP4_E5M3": _weight(4, 16, "nvfp4_v2") | _acts(4, 16, "nvfp4_v2"),
    "FPW8A16": _weight(8, 0, "fp"),
    "FP8_STATIC": _weight(8, -1, "fp") | _acts(8, 0, "fp", dynamic=False),
    "FP8_BLOCK": _weight(8, [128, 128], "fp") | _acts(8, 128, "fp"),
    "INT8": _weight(8, -1, "int") | _acts(8, -1, "int"),
    "INT8_W8A8": _weight(8, -1, "int") | _acts(8, -1, "int"),
    "INT4": _weight(4, -1, "int") | _acts(4, -1, "int"),
}


def _super(bits: int, size: int, sym: bool, super_bits: int, super_size: int) -> dict[str, Any]:
    return {
        "bits": bits,
        "group_size": size,
        "sym": sym,
        "data_type": "int_sym_dq" if sym else "int_asym_dq",
        "super_bits": super_bits,
        "super_group_size": super_size,
    }


def _plain(bits: int, sym: bool) -> dict[str, Any]:
    kind = "int" if sym else "int_asym_float_zp"
    return {"bits": bits, "group_size": 32, "sym": sym, "data_type": kind}


_GGUF: dict[str, dict[str, Any]] = {
    "Q4_0": _plain(4, True),
    "Q4_1": _plain(4, False),
    "Q5_0": _plain(5, True),
    "Q5_1": _plain(5, False),
    "Q8_0": _plain(8, True),
    "Q2_K_S": _super(2, 16, False, 4, 16),
    "Q3_K_S": _super(3, 16, True, 6, 16),
    "Q3_K_M": _super(3, 16, True, 6, 16),
    "Q3_K_L": _super(3, 16, True, 6, 16),
    "Q4_K_S": _super(4, 32, False, 6, 8),
    "Q4_K_M": _super(4, 32, False, 6, 8),
    "Q5_K_S": _super(5, 32, False, 6, 8),
    "Q5_K_M": _super(5, 32, False, 6, 8),
    "Q6_K": _super(6, 16, True, 8, 16),
}

_MIXED: dict[str, tuple[str, dict[str, str]]] = {
    "W4A16_MIXED": ("W4A16", {"linear": "W8A16", "experts": "W4A16", "lm_head": "W8A16"}),
    "GGUF:Q2_K_MIXED": (
        "GGUF:Q2_K_S",
        {
            "linear": "GGUF:Q4_K_S",
            "experts": "GGUF:Q2_K_S",
            "lm_head": "GGUF:Q8_0",
            "embedding": "GGUF:Q8_0",
        },
    ),
}


def builtin_schemes() -> list[Scheme]:
    """Return every preset of the table, in the order `ar schemes` prints."""
    rows = {**_INT, **_FLOAT}
    out = [scheme_from_dict(flat, name=name) for name, flat in rows.items()]
    out.append(Scheme(name="BF16"))
    out += [
        replace(scheme_from_dict(flat, name=f"GGUF:{name}"), fixed=True)
        for name, flat in _GGUF.items()
    ]
    by_name = {s.name: s for s in out}
    for name, (base, roles) in _MIXED.items():
        out.append(replace(by_name[base], name=name, roles=roles))
    return out
