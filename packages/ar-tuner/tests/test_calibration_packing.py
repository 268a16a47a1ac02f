from __future__ import annotations

import itertools
import random

import pytest

from ar_tuner import TunerError
from ar_tuner.calibration import SetRequest
from ar_tuner.calibration.encode import Encoded, Encoder, SetEncoder
from ar_tuner.calibration.packing import Row, Sieve, joined, looks_like_padding, rows_of
from ar_tuner.calibration.records import Tokens, ids_of


def encoded(number, *ids, prefix=()):
    return Encoded(number, number, prefix, ids_of(ids))


def stream(documents, separator, prefix, seqlen):
    """A slow oracle: one token at a time."""
    rows, row = [], []
    for ids in documents:
        for place, token in enumerate([*ids, *separator]):
            if place == 0 or not row:
                for first in prefix:
                    row.append(first)
                    if len(row) == seqlen:
                        rows.append(row)
                        row = list(prefix)
            row.append(token)
            if len(row) == seqlen:
                rows.append(row)
                row = []
    return rows


@pytest.mark.parametrize("prefix", [(), (9,)], ids=["no-beginning", "beginning"])
@pytest.mark.parametrize("separator", [(), (0,)], ids=["no-separator", "separator"])
@pytest.mark.parametrize("seqlen", [3, 7])
def test_short_documents_are_joined_as_an_oracle_does(prefix, separator, seqlen) -> None:
    chance = random.Random(1)
    documents = [[chance.randrange(1, 8) for _ in range(chance.randrange(1, 9))] for _ in range(40)]
    numbered = [encoded(i, *ids, prefix=prefix) for i, ids in enumerate(documents)]
    rows = list(joined(numbered, seqlen, separator))
    expected = stream(documents, separator, prefix, seqlen)
    assert [row.ids.tolist() for row in rows] == expected
    assert len(rows) > 10


def test_every_joined_row_begins_as_the_model_expects_and_documents_are_separated() -> None:
    documents = [encoded(i, 3, 4, 5, prefix=(9,)) for i in range(3)]
    rows = list(joined(documents, 6, (0,)))
    assert [row.ids.tolist() for row in rows] == [[9, 3, 4, 5, 0, 9], [9, 3, 4, 5, 0, 9]]
    plain = [encoded(i, 3, 4, 5) for i in range(3)]
    assert [row.ids.tolist() for row in joined(plain, 6, (0,))] == [
        [3, 4, 5, 0, 3, 4],
        [5, 0, 3, 4, 5, 0],
    ]


def test_a_beginning_is_counted_anew_in_every_row() -> None:
    """Rows stay full however many documents have gone by."""
    documents = [encoded(i, *range(1, 1 + i % 5 + 1), prefix=(9,)) for i in range(400)]
    rows = [row.ids for row in joined(documents, 16, (0,))]
    assert {len(row) for row in rows} == {16}
    assert all(row[0] == 9 for row in rows)
    total = sum(len(d.body) + 1 for d in documents)
    kept = sum(len(row) - row.count(9) for row in rows)
    assert total - 16 < kept <= total


def test_a_joined_row_knows_its_documents() -> None:
    documents = [encoded(i, 1, 2, 3) for i in range(5)]
    made_of = [row.documents for row in joined(documents, 4, (0,))]
    assert made_of == [(0,), (1,), (2,), (3,), (4,)]
    assert [row.documents for row in joined(documents, 5, ())] == [(0, 1), (1, 2, 3), (3, 4)]


def rows_from(texts, words, *, seqlen, wanted, **options):
    encoder = Encoder.of(words(**options), seqlen=seqlen)
    return list(rows_of(SetEncoder(SetRequest("s"), texts, encoder), seqlen=seqlen, wanted=wanted))


def test_beginnings_come_first_then_joined_texts_then_further_windows(words) -> None:
    long = [" ".join(f"{'x' * (i + j % 3)}" for j in range(11)) for i in (1, 11)]
    rows = rows_from([long[0], "a bb ccc", long[1], "dddd ee"], words, seqlen=4, wanted=9)
    assert [row.kind for row in rows] == ["whole", "whole", "packed", "further", "further"]
    assert [row.documents for row in rows] == [(0,), (2,), (1,), (0,), (2,)]
    ids = [list(map(len, text.split())) for text in long]
    assert [rows[0].ids.tolist(), rows[3].ids.tolist()] == [ids[0][:4], ids[0][4:8]]


def test_further_windows_begin_like_every_row_and_do_not_overlap(words) -> None:
    text = " ".join("x" * i for i in range(1, 12))
    rows = rows_from([text], words, seqlen=5, wanted=9, begins=True)
    assert [r.ids.tolist() for r in rows] == [[99, 1, 2, 3, 4], [99, 5, 6, 7, 8]]


@pytest.mark.parametrize("count", [1, 3])
def test_text_behind_what_was_first_encoded_is_used_when_it_is_needed(words, count) -> None:
    chance = random.Random(2)
    texts = [" ".join("x" * chance.randrange(1, 30) for _ in range(400)) for _ in range(count)]
    rows = rows_from(texts, words, seqlen=4, wanted=2)
    whole = [list(map(len, text.split())) for text in texts]
    got = {(row.documents[0], tuple(row.ids.tolist())) for row in rows}
    most = 2 * 8 * 4 * 2  # characters looked at for two rows of four tokens
    for number, ids in enumerate(whole):
        reach = [len(word) for word in texts[number][:most].split()]
        windows = [tuple(ids[i : i + 4]) for i in range(0, len(reach) - 4, 4)]
        assert {(number, window) for window in windows} <= got
    assert len(got) == len(rows)


def test_a_text_of_long_words_is_not_taken_for_a_short_one(words) -> None:
    rows = rows_from(["x" * 50 + " a bb ccc"], words, seqlen=4, wanted=5)
    assert rows[0].ids.tolist() == [50, 1, 2, 3]


def test_only_as_many_texts_are_encoded_as_are_needed(words) -> None:
    tokenizer = words()
    texts = [f"{i} a bb" for i in range(500)]
    documents = SetEncoder(SetRequest("s"), texts, Encoder.of(tokenizer, seqlen=3))
    list(itertools.islice(rows_of(documents, seqlen=3, wanted=40), 40))
    assert documents.seen == 64
    assert tokenizer.calls == 4  # two to learn what surrounds a text


def test_joining_everything_takes_long_texts_too(words) -> None:
    texts = ["a bb ccc dddd eeeee", "f gg"]
    documents = SetEncoder(SetRequest("s"), texts, Encoder.of(words(), seqlen=3))
    rows = list(rows_of(documents, seqlen=3, wanted=3, concat=True))
    assert [r.ids.tolist() for r in rows] == [[1, 2, 3], [4, 5, 0], [1, 2, 0]]


def row(*ids):
    return Row(ids_of(ids), (0,), "whole")


def test_a_row_passes_once_and_padding_never() -> None:
    met: set[bytes] = set()
    first, second = Sieve(met), Sieve(met)
    assert len(list(first([row(1, 2, 3), row(1, 2, 3), row(7, 7, 7)]))) == 1
    assert (first.duplicates, first.padding) == (1, 1)
    assert [r.ids.tolist() for r in second([row(1, 2, 3), row(4, 5, 6)])] == [[4, 5, 6]]
    assert (second.duplicates, second.padding) == (1, 0)


@pytest.mark.parametrize(
    ("ids", "verdict"),
    [
        ([1, 0, 0], True),
        ([1, 2, 0, 0], False),
        ([1, 0, 0, 0], True),
        ([0, 0, 0, 1], False),
        ([5, 5], False),
    ],
)
def test_more_than_half_equal_to_the_last_token_is_padding(ids, verdict) -> None:
    assert looks_like_padding(ids_of(ids)) is verdict


def test_equal_documents_have_one_number_and_pass_once(words) -> None:
    encoder = Encoder.of(words(), seqlen=3)
    documents = SetEncoder(SetRequest("s"), ["a b", "c d e", "a b"], encoder)
    assert [d.number for d in documents.encoded(100)] == [0, 1]
    assert (len(documents), documents.seen, documents.duplicates) == (3, 2, 1)
    other = SetEncoder(SetRequest("t"), ["c d e"], encoder)
    assert [d.number for d in other.encoded(100)] == [1]


def test_token_data_that_brings_its_beginning_keeps_one(words) -> None:
    tokens = [Tokens(ids_of(ids)) for ids in ([99, 5, 6], [5, 6, 7])]
    encoder = Encoder.of(words(begins=True), seqlen=3)
    found = list(SetEncoder(SetRequest("s"), tokens, encoder).encoded(100))
    assert [(d.prefix, d.body.tolist()) for d in found] == [((99,), [5, 6]), ((), [5, 6, 7])]


def test_half_a_surrogate_pair_does_not_stop_a_run(words) -> None:
    documents = SetEncoder(SetRequest("s"), ["a \ud800 b"], Encoder.of(words(), seqlen=3))
    assert next(documents.encoded(100)).body.tolist() == [1, 1, 1]


def test_a_row_needs_room_beside_what_is_before_a_text(words) -> None:
    with pytest.raises(TunerError, match="seqlen 1 leaves no room beside the 1 tokens"):
        Encoder.of(words(begins=True), seqlen=1)


def test_what_a_tokenizer_puts_behind_a_text_separates(words) -> None:
    class Ends(words):
        def __call__(self, texts, *, add_special_tokens=True, verbose=True):
            found = super().__call__(texts, add_special_tokens=add_special_tokens)
            if add_special_tokens:
                found.input_ids = [[*ids, 98] for ids in found.input_ids]
            return found

    encoder = Encoder.of(Ends(begins=True), seqlen=3)
    assert (encoder.prefix, encoder.separator) == ((99,), (98,))
    assert Encoder.of(words(), seqlen=3).separator == (0,)
    assert Encoder.of(None, seqlen=3).separator == ()
