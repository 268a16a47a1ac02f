from __future__ import annotations

import pytest

from ar_schemes import schemes

EXPECTED = [
    "W2A16",
    "W2A16G32",
    "W2A16G64",
    "W3A16",
    "W4A16",
    "W5A16",
    "W6A16",
    "W7A16",
    "W8A16",
    "W4A16_MIXED",
    "MXFP4",
    "MXFP4_RCEIL",
    "MXFP8",
    "MXFP8_RCEIL",
    "MXINT4",
    "NVFP4",
    "NVFP4_E5M3",
    "FPW8A16",
    "FP8_STATIC",
    "FP8_BLOCK",
    "INT8",
    "INT8_W8A8",
    "INT4",
    "BF16",
    "GGUF:Q4_0",
    "GGUF:Q4_1",
    "GGUF:Q5_0",
    "GGUF:Q5_1",
    "GGUF:Q8_0",
    "GGUF:Q2_K_S",
    "GGUF:Q3_K_S",
    "GGUF:Q3_K_M",
    "GGUF:Q3_K_L",
    "GGUF:Q4_K_S",
    "GGUF:Q4_K_M",
    "GGUF:Q5_K_S",
    "GGUF:Q5_K_M",
    "GGUF:Q6_K",
    "GGUF:Q2_K_MIXED",
]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_preset_is_there(name) -> None:
    assert name in schemes()


@pytest.mark.parametrize("name", [n for n in EXPECTED if n.startswith("W") and n[2:5] == "A16"])
def test_a_weight_only_preset_is_what_its_name_says(name) -> None:
    found = schemes()[name]
    if found.roles:
        pytest.skip("a mixed preset: its roles decide")
    assert found.weight.bits == int(name[1])
    assert found.activation is None
    size = int(name.partition("G")[2] or 128)
    assert found.weight.group_size == size


@pytest.mark.parametrize(
    ("name", "bits"),
    [("W4A16", 4.125), ("W3A16", 3.125), ("W2A16G32", 2.5), ("GGUF:Q4_0", 4.5), ("BF16", 16.0)],
)
def test_bits_per_weight_are_known(name, bits) -> None:
    assert schemes()[name].bits_per_weight(4096, 4096) == bits
