from __future__ import annotations

import pytest

from ar_schemes import SchemeError, scheme, scheme_from_dict, schemes

# name, bits, group size, sym, data type, then of the activations bits, group size, data type,
# dynamic: the table of the AutoRound family, 16 activation bits left out.
WEIGHT_ONLY = [
    ("W4A16", 4, 128, True, "int"),
    ("W2A16", 2, 128, True, "int"),
    ("W3A16", 3, 128, True, "int"),
    ("W5A16", 5, 128, True, "int"),
    ("W6A16", 6, 128, True, "int"),
    ("W7A16", 7, 128, True, "int"),
    ("W8A16", 8, 128, True, "int"),
    ("FPW8A16", 8, 0, True, "fp"),
    ("W2A16G64", 2, 64, True, "int"),
    ("W2A16G32", 2, 32, True, "int"),
    ("W4A16_MIXED", 4, 128, True, "int"),
    ("GGUF:Q4_0", 4, 32, True, "int"),
    ("GGUF:Q4_1", 4, 32, False, "int_asym_float_zp"),
    ("GGUF:Q5_0", 5, 32, True, "int"),
    ("GGUF:Q5_1", 5, 32, False, "int_asym_float_zp"),
    ("GGUF:Q8_0", 8, 32, True, "int"),
    *((f"W{b}A16G{g}", b, g, True, "int") for b in range(3, 9) for g in (64, 32)),
]
WITH_ACTIVATIONS = [
    ("MXFP4", 4, 32, "mx_fp", 4, 32, "mx_fp", True),
    ("MXFP6", 6, 32, "mx_fp", 6, 32, "mx_fp", True),
    ("MXFP8", 8, 32, "mx_fp", 8, 32, "mx_fp", True),
    ("MXFP4_RCEIL", 4, 32, "mx_fp", 4, 32, "mx_fp_rceil", True),
    ("MXFP8_RCEIL", 8, 32, "mx_fp", 8, 32, "mx_fp_rceil", True),
    ("MXINT4", 4, 32, "mx_int", 4, 32, "mx_int", True),
    ("NVFP4", 4, 16, "nv_fp", 4, 16, "nv_fp4_with_static_gs", True),
    ("NVFP4_E5M3", 4, 16, "nvfp4_v2", 4, 16, "nvfp4_v2", True),
    ("FP8_STATIC", 8, -1, "fp", 8, 0, "fp", False),
    ("FP8_BLOCK", 8, (128, 128), "fp", 8, 128, "fp", True),
    ("INT4", 4, -1, "int", 4, -1, "int", True),
    ("INT8", 8, -1, "int", 8, -1, "int", True),
    ("INT8_W8A8", 8, -1, "int", 8, -1, "int", True),
]
# name, bits, group size, sym, bits of the inner scales, groups in a super group, bits per weight
K_TYPES = [
    ("GGUF:Q2_K_S", 2, 16, False, 4, 16, 2.625),
    ("GGUF:Q2_K_MIXED", 2, 16, False, 4, 16, 2.625),
    ("GGUF:Q3_K_S", 3, 16, True, 6, 16, 3.4375),
    ("GGUF:Q3_K_M", 3, 16, True, 6, 16, 3.4375),
    ("GGUF:Q3_K_L", 3, 16, True, 6, 16, 3.4375),
    ("GGUF:Q4_K_S", 4, 32, False, 6, 8, 4.5),
    ("GGUF:Q4_K_M", 4, 32, False, 6, 8, 4.5),
    ("GGUF:Q5_K_S", 5, 32, False, 6, 8, 5.5),
    ("GGUF:Q5_K_M", 5, 32, False, 6, 8, 5.5),
    ("GGUF:Q6_K", 6, 16, True, 8, 16, 6.5625),
]


def first(row: tuple[object, ...]) -> str:
    return str(row[0])


@pytest.mark.parametrize("row", WEIGHT_ONLY, ids=first)
def test_a_weight_only_preset_is_its_row_of_the_table(row) -> None:
    name, *expected = row
    found = schemes()[name]
    spec = found.weight
    assert [spec.bits, spec.group_size, spec.symmetric, spec.data_type] == expected
    assert found.activation is None
    assert spec.super_group is None


@pytest.mark.parametrize("row", WITH_ACTIVATIONS, ids=first)
def test_a_preset_with_activations_is_its_row_of_the_table(row) -> None:
    name, bits, size, kind, act_bits, act_size, act_kind, dynamic = row
    found = schemes()[name]
    weight, activation = found.weight, found.activation
    assert (weight.bits, weight.group_size, weight.data_type) == (bits, size, kind)
    assert weight.symmetric
    assert activation.symmetric
    assert (activation.bits, activation.group_size) == (act_bits, act_size)
    assert (activation.data_type, activation.dynamic) == (act_kind, dynamic)


@pytest.mark.parametrize("row", K_TYPES, ids=first)
def test_a_k_type_is_its_row_of_the_table(row) -> None:
    name, bits, size, symmetric, inner_bits, inner_size, stored = row
    spec = schemes()[name].weight
    assert (spec.bits, spec.group_size, spec.symmetric) == (bits, size, symmetric)
    assert (spec.super_group.bits, spec.super_group.size) == (inner_bits, inner_size)
    assert spec.data_type == ("int_sym_dq" if symmetric else "int_asym_dq")
    assert spec.bits_per_weight(16, 256) == stored


def test_the_table_holds_no_other_preset_than_the_float_one() -> None:
    tested = {first(r) for r in (*WEIGHT_ONLY, *WITH_ACTIVATIONS, *K_TYPES)}
    assert set(schemes()) - tested == {"BF16"}
    assert schemes()["BF16"].is_float


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("W4A16_MIXED", {"linear": "W8A16", "experts": "W4A16", "lm_head": "W8A16"}),
        (
            "GGUF:Q2_K_MIXED",
            {
                "linear": "GGUF:Q4_K_S",
                "experts": "GGUF:Q2_K_S",
                "lm_head": "GGUF:Q8_0",
                "embedding": "GGUF:Q8_0",
            },
        ),
    ],
)
def test_a_mixed_preset_names_known_schemes_by_role(name, roles) -> None:
    assert schemes()[name].roles == roles
    assert set(roles.values()) <= set(schemes())


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("W4A16", 4.125),
        ("W3A16", 3.125),
        ("W2A16G32", 2.5),
        ("MXFP4", 4.25),
        ("NVFP4", 4.5),
        ("NVFP4_E5M3", 4.5),
        ("FP8_BLOCK", 8 + 32 / 128**2),
        ("GGUF:Q4_0", 4.5),
        ("GGUF:Q4_1", 5.0),
        ("BF16", 16.0),
    ],
)
def test_bits_per_weight_are_those_on_disk(name, bits) -> None:
    assert schemes()[name].bits_per_weight(4096, 4096) == bits


@pytest.mark.parametrize("name", [n for n in schemes() if n.startswith("GGUF:")])
def test_the_numbers_of_a_gguf_preset_are_fixed(name) -> None:
    with pytest.raises(SchemeError, match="fixed by the file format"):
        scheme(name).with_overrides({"group_size": 64})


@pytest.mark.parametrize("name", list(schemes()))
def test_the_flat_form_of_a_preset_gives_its_tensors_back(name) -> None:
    found = scheme(name)
    again = scheme_from_dict(found.to_dict())
    assert (again.weight, again.activation) == (found.weight, found.activation)
