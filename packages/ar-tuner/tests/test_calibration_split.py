from __future__ import annotations

import random

import pytest

from ar_tuner import TunerError
from ar_tuner.calibration import split_rows


def kinds():
    """Rows as documents: one each, windows of few, a chain, and a mix of all."""
    own = [(i,) for i in range(40)]
    windows = [(i // 4,) for i in range(40)]
    chain = [(i, i + 1) for i in range(40)]
    mixed = (
        own[:10] + [(100 + i // 3,) for i in range(15)] + [(200 + i, 201 + i) for i in range(15)]
    )
    random.Random(3).shuffle(mixed)
    return {"own": own, "windows": windows, "chain": chain, "mixed": mixed}


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_document_is_on_both_sides(kind, share, seed) -> None:
    documents = kinds()[kind]
    train, held = split_rows(documents, share, seed)
    assert not {n for row in train for n in documents[row]} & {
        n for row in held for n in documents[row]
    }
    assert abs(len(held) - share * len(documents)) <= 2
    assert len(train) + len(held) >= len(documents) - 2
    assert (train, held) == (sorted(train), sorted(held))


def test_the_seed_decides_and_nothing_else() -> None:
    documents = [(i,) for i in range(40)]
    random.seed(1)
    first = split_rows(documents, 0.1, 7)
    random.seed(2)
    assert split_rows(documents, 0.1, 7) == first
    assert split_rows(documents, 0.1, 8) != first


def test_at_least_one_row_is_held_out() -> None:
    assert len(split_rows([(0,), (1,), (2,)], 0.01, 0)[1]) == 1


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_a_share_outside_its_range_is_refused(share) -> None:
    with pytest.raises(TunerError, match="use a number between 0 and 1"):
        split_rows([(0,), (1,)], share, 0)


@pytest.mark.parametrize("documents", [[(0,)], [(0,)] * 9, []], ids=["one", "same", "none"])
def test_rows_of_one_document_cannot_be_split(documents) -> None:
    with pytest.raises(TunerError, match="Give more documents, or hold nothing out"):
        split_rows(documents, 0.2, 0)
