"""No hole in the matrix of schemes and formats that auto-round's has not."""

from __future__ import annotations

import pytest

from ar_export import formats
from ar_export.matrix import reason, support_matrix
from ar_schemes import scheme

INTS = "auto_round auto_gptq llm_compressor mlx fake"
AUTO_ROUND: dict[str, str] = {
    **dict.fromkeys(("W2A16", "W2A16G64", "W2A16G32", "W3A16", "W8A16"), INTS),
    "W4A16": f"{INTS} auto_awq",
    "W4A16_MIXED": "auto_round auto_gptq fake",
    **dict.fromkeys(("W5A16", "W6A16"), "mlx fake"),
    "BF16": "auto_round auto_gptq mlx fake",
    "MXFP4": "auto_round llm_compressor svdquant_nunchaku fake",
    **dict.fromkeys(
        ("MXFP8", "NVFP4", "NVFP4_E5M3", "FPW8A16", "FP8_STATIC"), "auto_round llm_compressor fake"
    ),
    "MXINT4": "auto_round fake",
    "FP8_BLOCK": "auto_round llm_compressor fp8 fake",
    **dict.fromkeys(("INT8", "INT8_W8A8"), "llm_compressor fake"),
    **dict.fromkeys(("INT4", "MXFP6", "MXFP4_RCEIL", "MXFP8_RCEIL"), "fake"),
    **{
        f"GGUF:{kind}": "gguf fake"
        for kind in (
            *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K_S", "Q2_K_MIXED", "Q3_K_S"),
            *("Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
        )
    },
}
"""What `auto-round list format` of 0.15 prints: scheme to the formats it exports it in."""
NOTHING = "quantizes nothing: the source checkpoint is that already"
NOT_CARRIED = {
    **{("BF16", form): NOTHING for form in ("auto_round", "auto_gptq", "mlx", "fake")},
    ("MXFP4", "svdquant_nunchaku"): "low-rank diffusion transformers, no language models",
    ("NVFP4_E5M3", "llm_compressor"): "knows no E5M3 scales and rejects the config",
}
"""Cells that are left out, each because no engine would open the checkpoint."""
CELLS = [(name, form) for name, row in AUTO_ROUND.items() for form in row.split()]


@pytest.mark.parametrize(("name", "form"), CELLS, ids=[f"{n}-{f}" for n, f in CELLS])
def test_what_auto_round_carries_is_carried_or_left_out_for_a_reason(name, form) -> None:
    why = NOT_CARRIED.get((name, form))
    if why is None:
        assert reason(formats()[form], scheme(name)) is None
    elif form in formats() and scheme(name).weight is not None:
        assert why in str(reason(formats()[form], scheme(name)))
    else:
        assert form not in formats() or scheme(name).weight is None


def test_a_mixed_scheme_is_carried_where_each_of_its_parts_is() -> None:
    row = support_matrix()["W4A16_MIXED"]
    assert row["auto_round"] is None
    assert "awq holds int of 4 bits, not int8" in str(row["auto_awq"])
    row = support_matrix()["GGUF:Q2_K_MIXED"]
    assert row["gguf"] is None
    assert row["auto_round"] is not None


def test_every_hole_has_a_reason_on_one_line() -> None:
    for name, row in support_matrix().items():
        for form, why in row.items():
            assert why is None or (why.strip() and "\n" not in why), (name, form)
