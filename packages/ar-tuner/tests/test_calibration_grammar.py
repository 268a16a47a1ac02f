from __future__ import annotations

import pytest

from ar_tuner import TunerError
from ar_tuner.calibration import SetRequest, parse_sets


@pytest.mark.parametrize(
    ("text", "requests"),
    [
        ("a.json", [SetRequest("a.json")]),
        ("NeelNanda/pile-10k", [SetRequest("NeelNanda/pile-10k")]),
        (
            "a.json,NeelNanda/pile-10k:split=train+validation:num=64:concat:apply_chat_template"
            ":system_prompt=Be brief.",
            [
                SetRequest("a.json"),
                SetRequest(
                    "NeelNanda/pile-10k",
                    splits=("train", "validation"),
                    num=64,
                    concat=True,
                    chat=True,
                    system_prompt="Be brief.",
                ),
            ],
        ),
        ("a:concat=True, b:concat=false", [SetRequest("a", concat=True), SetRequest("b")]),
        ("a:apply_chat_template=False", [SetRequest("a", chat=False)]),
        ("a:key=body:subset=en", [SetRequest("a", key="body", subset="en")]),
        ("a:system_prompt=", [SetRequest("a", chat=True)]),
        (
            "a:system_prompt='You are: kind, brief':num=3",
            [SetRequest("a", num=3, chat=True, system_prompt="You are: kind, brief")],
        ),
        (
            "a:system_prompt=You're kind",
            [SetRequest("a", chat=True, system_prompt="You're kind")],
        ),
        ('"odd:name,1.json":num=2', [SetRequest("odd:name,1.json", num=2)]),
    ],
)
def test_sets_and_options_are_told_apart(text, requests) -> None:
    assert list(parse_sets(text)) == requests


@pytest.mark.parametrize("path", [r"C:\data\a.json", "C:/data/a.json", r"\\host\share\a.json"])
def test_a_windows_path_is_not_cut_at_the_colon(path) -> None:
    both = parse_sets(f"{path}:num=3,{path}")
    assert [(r.name, r.num) for r in both] == [(path, 3), (path, None)]


def test_a_system_prompt_stays_with_its_own_set() -> None:
    first, second = parse_sets("a:system_prompt=Be brief.,b:apply_chat_template")
    assert (first.system_prompt, second.system_prompt) == ("Be brief.", None)


def test_the_same_set_twice_keeps_both_splits_and_numbers() -> None:
    first, second = parse_sets("a:split=train:num=3,a:split=test:num=5")
    assert (first.splits, first.num) == (("train",), 3)
    assert (second.splits, second.num) == (("test",), 5)
    assert first.label != second.label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:nmu=3", r"unknown dataset option 'nmu'. Did you mean num\? Known: .*system_prompt"),
        ("a:split", "split= is not allowed"),
        ("a:split=train+", r"split=train\+ is not allowed: use names joined"),
        ("a:num=many", "num=many is not allowed: use a whole number of at least 1"),
        ("a:num=0", "num=0 is not allowed"),
        ("a:num", "num= is not allowed"),
        ("a:concat=maybe", "concat=maybe is not allowed: use true or false"),
        ("a:key=", "key= is not allowed"),
        ("a:subset", "subset= is not allowed"),
        ("a:system_prompt", "system_prompt= is not allowed"),
        ("a:num=1:num=2", "num is given twice for a"),
        ("a:apply_chat_template=false:system_prompt=x", "chat template that is switched off"),
        ("a,,b", "a set has no name"),
        ("", "a set has no name"),
        ("a:split=train,num=3", "'num=3' stands where a set should be named"),
        ("a:system_prompt='x", "opened and not closed"),
    ],
)
def test_a_wrong_request_names_what_is_wrong_and_allowed(text, message) -> None:
    with pytest.raises(TunerError, match=message):
        parse_sets(text)
