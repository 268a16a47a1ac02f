from __future__ import annotations

import pytest

from ar_schemes import SchemeError, scheme
from ar_tuner import AutoRound, AutoScheme, TunerError

OPTIONS = ("W2A16", "W4A16")


def test_options_come_as_text_or_list_each_once() -> None:
    named = AutoScheme(3.0, " W2A16, w4a16,W2A16 ").schemes
    assert list(named) == ["W2A16", "W4A16"]
    mixed = AutoScheme(3.0, [scheme("W2A16"), "W2A16", {"bits": 5, "group_size": 32}])
    assert [s.weight.bits for s in mixed.schemes.values()] == [2, 5]
    # llama.cpp's S and M have the same numbers: one option
    assert len(AutoScheme(4.0, "GGUF:Q3_K_S,GGUF:Q3_K_M").schemes) == 1


def test_targets_are_one_number_several_or_a_size() -> None:
    assert AutoScheme(3, OPTIONS).targets == (3,)
    assert AutoScheme([2.5, 3.0], OPTIONS).targets == (2.5, 3.0)
    assert AutoScheme(options=OPTIONS, target_size="3.2GB").target_bytes == 3_200_000_000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"avg_bits": 3.0}, "needs options"),
        ({"options": OPTIONS}, "avg_bits or target_size, and not both"),
        ({"avg_bits": 3.0, "options": OPTIONS, "target_size": 9}, "not both"),
        ({"avg_bits": 0, "options": OPTIONS}, "avg_bits 0 is not allowed"),
        ({"avg_bits": [3.0, "x"], "options": OPTIONS}, "avg_bits 'x'"),
        ({"avg_bits": [], "options": OPTIONS}, "avg_bits"),
        ({"avg_bits": 3.0, "options": "W4A16_MIXED"}, "itself a mix over layers"),
        ({"avg_bits": 3.0, "options": OPTIONS, "shared_layers": "q_proj"}, "list of lists"),
        ({"avg_bits": 3.0, "options": OPTIONS, "shared_layers": ["q_proj"]}, "list of lists"),
        ({"avg_bits": 3.0, "options": OPTIONS, "nsamples": 0}, "nsamples 0 is not allowed"),
        ({"avg_bits": 3.0, "options": OPTIONS, "seqlen": 1}, "at least 2"),
        ({"options": OPTIONS, "target_size": "many"}, "target_size 'many'"),
    ],
)
def test_what_cannot_be_is_refused(given, said) -> None:
    with pytest.raises(TunerError, match=said):
        AutoScheme(**given)


def test_unknown_options_and_arguments_are_refused() -> None:
    with pytest.raises(SchemeError, match="Did you mean W4A16"):
        AutoScheme(3.0, "W4A61")
    with pytest.raises(TypeError, match="avg_bit"):
        AutoScheme(avg_bit=3.0, options=OPTIONS)


def test_an_unknown_method_is_refused_before_work(model) -> None:
    with pytest.raises(TunerError, match=r"unknown method 'fischer'. Did you mean fisher"):
        AutoRound(model(), scheme=AutoScheme(3.0, OPTIONS, method="fischer"))


def test_the_references_name_of_the_default_method_is_ours() -> None:
    assert AutoScheme(3.0, OPTIONS, method="default").scorer == "fisher"


def test_arguments_win_over_the_environment_and_that_over_defaults(monkeypatch) -> None:
    assert AutoScheme(3.0, OPTIONS).number("nsamples") == 64
    monkeypatch.setenv("AR_AUTO_SCHEME_NSAMPLES", "5")
    assert AutoScheme(3.0, OPTIONS).number("nsamples") == 5
    assert AutoScheme(3.0, OPTIONS, nsamples=7).number("nsamples") == 7
    monkeypatch.setenv("AR_AUTO_SCHEME_NSAMPLES", "few")
    with pytest.raises(TunerError, match="AR_AUTO_SCHEME_NSAMPLES 'few'"):
        AutoScheme(3.0, OPTIONS)
