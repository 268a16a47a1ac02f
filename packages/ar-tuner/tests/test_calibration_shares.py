from __future__ import annotations

import pytest

from ar_tuner import TunerError
from ar_tuner.calibration import parse_sets
from ar_tuner.calibration.packing import Row
from ar_tuner.calibration.records import ids_of
from ar_tuner.calibration.shares import draw, shares


@pytest.mark.parametrize(
    ("text", "total", "parts"),
    [
        ("a", 128, [128]),
        ("a,b", 128, [64, 64]),
        ("a,b,c", 128, [43, 43, 42]),
        ("a:num=100,b,c", 128, [100, 14, 14]),
        ("a:num=3", 128, [3]),
        ("a:num=3,b:num=5", 128, [3, 5]),
        ("a:num=300,b:num=100", 128, [96, 32]),
        ("a:num=500", 128, [128]),
    ],
)
def test_rows_are_shared_out(text, total, parts) -> None:
    assert shares(parse_sets(text), total) == parts


@pytest.mark.parametrize("text", ["a:num=128,b", "a:num=200,b", "a:num=1,b:num=1000"])
def test_a_set_for_which_no_row_is_left_is_refused(text) -> None:
    with pytest.raises(TunerError, match=r"no row is left for the calibration dataset [ab]:"):
        shares(parse_sets(text), 128)


def rows(count):
    return iter([Row(ids_of([i]), (i,), "whole") for i in range(count)])


def test_what_one_set_lacks_the_unbounded_ones_give() -> None:
    counts = [len(p) for p in draw([rows(9), rows(1), rows(9)], [3, 4, 2], [True, True, False])]
    assert counts == [6, 1, 2]
    counts = [len(p) for p in draw([rows(4), rows(1), rows(9)], [3, 6, 2], [True, True, True])]
    assert counts == [4, 1, 6]
    counts = [len(p) for p in draw([rows(9), rows(1)], [3, 4], [False, False])]
    assert counts == [3, 1]
