from __future__ import annotations

import pytest

from ar_schemes import SchemeError, describe, scheme, scheme_from_dict, schemes


def test_a_preset_is_found_in_any_case() -> None:
    assert scheme("w4a16") == scheme("W4A16")


def test_an_unknown_scheme_lists_known_ones_and_the_nearest() -> None:
    with pytest.raises(SchemeError, match=r"unknown scheme 'W4A61'. Did you mean W4A16.*Known: "):
        scheme("W4A61")


@pytest.mark.parametrize("name", list(schemes()))
def test_the_flat_form_of_every_preset_gives_it_back(name) -> None:
    found = scheme(name)
    again = scheme_from_dict(found.to_dict(), name=name)
    assert again.to_dict() == found.to_dict()
    assert describe(found)


def test_overrides_change_fields_and_the_name() -> None:
    changed = scheme("W4A16").with_overrides({"bits": 3, "group_size": 64, "sym": False})
    assert changed.name == "W3A16G64-asym"
    assert (changed.weight.bits, changed.weight.group_size) == (3, 64)
    assert not changed.weight.symmetric


def test_overrides_that_change_nothing_keep_the_preset() -> None:
    w4 = scheme("W4A16")
    assert w4.with_overrides({"bits": 4, "group_size": None}) is w4


def test_sixteen_bits_mean_not_quantized() -> None:
    assert scheme("W4A16").with_overrides({"bits": 16}).is_float


def test_numbers_that_a_file_format_fixes_cannot_be_changed() -> None:
    with pytest.raises(SchemeError, match="fixed by the file format"):
        scheme("GGUF:Q4_0").with_overrides({"bits": 3})


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"bitz": 4}, "unknown scheme key 'bitz'. Did you mean bits"),
        ({"bits": "4"}, "use a whole number"),
        ({"bits": 4, "group_size": -7}, "group size -7 is not allowed"),
    ],
    ids=["key", "type", "range"],
)
def test_a_flat_form_with_a_mistake_is_refused(flat, message) -> None:
    with pytest.raises(SchemeError, match=message):
        scheme_from_dict(flat)


def test_activations_follow_the_weight_where_nothing_is_said() -> None:
    found = scheme_from_dict({"bits": 8, "group_size": -1, "act_bits": 8})
    assert found.activation.data_type == "int"
    assert str(found.activation.granularity) == "token"
