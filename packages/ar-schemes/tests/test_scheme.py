from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ar_schemes import FIELDS, Scheme, SchemeError, describe, scheme, scheme_from_dict

FLAT = st.fixed_dictionaries(
    {
        "bits": st.integers(1, 15),
        "group_size": st.sampled_from([-1, 0, 16, 32, 128, [64, 64]]),
        "sym": st.booleans(),
        "data_type": st.sampled_from(["int", "mx_fp", "nv_fp"]),
    },
    optional={
        "act_bits": st.integers(1, 15),
        "act_sym": st.booleans(),
        "act_dynamic": st.booleans(),
        "act_group_size": st.sampled_from([-1, 0, 32]),
        "act_data_type": st.sampled_from(["int", "fp"]),
    },
)


@given(FLAT)
def test_the_flat_form_gives_the_scheme_back(flat) -> None:
    found = scheme_from_dict(flat)
    assert scheme_from_dict(found.to_dict()) == found
    assert set(found.to_dict()) <= set(FIELDS)


@given(FLAT)
def test_overrides_with_its_own_numbers_change_nothing(flat) -> None:
    found = scheme_from_dict(flat)
    assert found.with_overrides(found.to_dict()) is found


def test_an_unknown_scheme_lists_known_ones_and_the_nearest() -> None:
    with pytest.raises(SchemeError, match=r"unknown scheme 'W4A61'. Did you mean W4A16.*Known: "):
        scheme("W4A61")


def test_overrides_change_fields_and_the_name() -> None:
    changed = scheme("W4A16").with_overrides({"bits": 3, "group_size": 64, "sym": False})
    assert changed.name == "W3A16G64-asym"
    assert (changed.weight.bits, changed.weight.group_size) == (3, 64)
    assert not changed.weight.symmetric


@pytest.mark.parametrize("overrides", [{}, {"bits": None}, {"bits": 4, "group_size": None}])
def test_overrides_that_change_nothing_keep_the_preset(overrides) -> None:
    w4 = scheme("W4A16")
    assert w4.with_overrides(overrides) is w4


def test_overrides_keep_the_roles_of_a_mixed_preset() -> None:
    assert scheme("W4A16_MIXED").with_overrides({"bits": 3}).roles["linear"] == "W8A16"


def test_sixteen_bits_mean_not_quantized() -> None:
    assert scheme("W4A16").with_overrides({"bits": 16}).is_float
    assert scheme_from_dict({"bits": 16}).name == "BF16"
    assert scheme("BF16").to_dict() == {"bits": 16, "data_type": "fp"}
    assert scheme("BF16").bits_per_weight(8, 8) == 16


def test_a_float_scheme_with_new_bits_becomes_an_integer_one() -> None:
    assert scheme("BF16").with_overrides({"bits": 4}).weight == scheme("W4A16").weight


def test_a_float_scheme_without_new_bits_cannot_be_changed() -> None:
    with pytest.raises(SchemeError, match="scheme BF16 keeps the weight in 16 bit, so group_size"):
        scheme("BF16").with_overrides({"group_size": 64})


def test_numbers_that_a_file_format_fixes_cannot_be_changed() -> None:
    with pytest.raises(SchemeError, match="fixed by the file format, so bits cannot"):
        scheme("GGUF:Q4_0").with_overrides({"bits": 3})


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"bitz": 4}, "unknown scheme key 'bitz'. Did you mean bits"),
        ({"bitz": 4, "bits": 16}, "unknown scheme key 'bitz'"),
        ({"bits": "4"}, "bits '4' is not allowed: use a whole number"),
        ({"bits": True}, "use a whole number"),
        ({"bits": 0}, "bits 0 is not allowed: use a whole number above 0"),
        ({"act_bits": "8"}, "act_bits '8' is not allowed: use a whole number"),
        ({"sym": "false"}, "sym 'false' is not allowed: use true or false"),
        ({"sym": 1}, "use true or false"),
        ({"act_dynamic": "no"}, "use true or false"),
        ({"data_type": 4}, "use the name of a data type"),
        ({"group_size": -7}, "group size -7 is not allowed"),
        ({"group_size": [128, 0]}, "2 positive number"),
        ({"super_bits": 6}, "super_bits needs the other one too"),
        ({"super_group_size": 8}, "give both super_group_size and super_bits"),
    ],
)
def test_a_flat_form_with_a_mistake_is_refused(flat, message) -> None:
    with pytest.raises(SchemeError, match=message):
        scheme_from_dict(flat)
    with pytest.raises(SchemeError, match=message):
        scheme("W4A16").with_overrides(flat)


def test_activations_follow_the_weight_where_nothing_is_said() -> None:
    found = scheme_from_dict({"bits": 8, "group_size": -1, "sym": False, "act_bits": 8})
    assert found.activation.data_type == "int"
    assert str(found.activation.granularity) == "token"
    assert not found.activation.symmetric
    assert found.activation.dynamic


def test_sixteen_activation_bits_mean_none() -> None:
    assert scheme_from_dict({"act_bits": 16, "act_group_size": 32}).activation is None


@pytest.mark.parametrize(
    ("flat", "name"),
    [
        ({}, "W4A16G128"),
        ({"group_size": -1}, "W4A16-channel"),
        ({"group_size": 0}, "W4A16-tensor"),
        ({"group_size": [128, 64]}, "W4A16G128x64"),
        ({"data_type": "mx_fp", "act_bits": 4, "group_size": 32}, "W4A4G32-mx_fp"),
        ({"sym": False}, "W4A16G128-asym"),
    ],
)
def test_a_scheme_without_a_name_gets_one_that_describes_it(flat, name) -> None:
    assert scheme_from_dict(flat).name == name


def test_the_float_scheme_describes_itself() -> None:
    assert describe(Scheme(name="x")) == "BF16"
