from __future__ import annotations

import json
import random

import pytest
import torch
from torch.utils.data import DataLoader

from ar_tuner import TunerError
from ar_tuner.calibration import calibration_rows, check_seqlen
from ar_tuner.calibration.packing import pack
from ar_tuner.calibration.sources import read_file, text_of


class Words:
    """A tokenizer: one id per word, its length."""

    eos_token_id = 0

    def __call__(self, text: str, *, verbose: bool = True):
        return type("Encoded", (), {"input_ids": [len(w) for w in text.split()]})()


def rows_of(dataset, *, nsamples=4, seqlen=8, seed=0, tokenizer=None, **kwargs):
    return calibration_rows(
        dataset, tokenizer or Words(), nsamples=nsamples, seqlen=seqlen, seed=seed, **kwargs
    )


LONG = [f"{'x ' * 10}{'y' * i}" for i in range(1, 7)]


def test_long_texts_are_cut_in_the_order_of_the_seed() -> None:
    first, report = rows_of(LONG)
    assert first.shape == (4, 8)
    assert report.notes() == []
    texts = [f"{'a' * i} " * 9 for i in range(1, 7)]
    orders = [rows_of(texts, seed=s)[0][:, 0].tolist() for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    random.seed(5)
    torch.manual_seed(5)
    before = (random.getstate(), torch.get_rng_state())
    once, _ = rows_of(LONG)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(6)
    assert torch.equal(once, rows_of(LONG)[0])


def test_short_texts_are_packed_instead_of_dropped() -> None:
    found, report = rows_of(["aa bb cc"] * 9, seqlen=8)
    assert found.tolist() == [[2, 2, 2, 0, 2, 2, 2, 0]] * 4
    assert report.packed == 4
    assert "short texts joined" in report.notes()[0]


def test_later_parts_of_long_texts_fill_what_is_missing() -> None:
    found = pack(["a " * 25], lambda t: [1] * len(t.split()), rows=4, seqlen=8, separator=None)
    assert (found.whole, found.packed, found.further) == (1, 0, 2)
    assert len(found.rows) == 3


def test_fewer_rows_than_asked_are_reported() -> None:
    _, report = rows_of(LONG, nsamples=100)
    assert "6 rows of 8 tokens, fewer than the 100 asked for" in report.notes()[-1]


def test_too_little_text_for_one_row_is_refused() -> None:
    with pytest.raises(TunerError, match="fewer than seqlen 8 tokens"):
        rows_of(["one two"])


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("a.txt", "first paragraph\n\nsecond one\n", 2),
        ("a.json", '["one", {"text": "two"}]', 2),
        ("b.json", '{"data": [{"content": "one"}]}', 1),
        ("a.jsonl", '{"text": "one"}\n\n"two\\u2028still two"\n', 2),
        ("b.jsonl", '{"text": "line\u2028separator"}\n', 1),
        ("c.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n', 1),
    ],
)
def test_a_file_of_any_kind_gives_its_texts(tmp_path, name, content, count) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert len(list(read_file(tmp_path / name))) == count


def test_a_parquet_file_gives_its_texts(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert list(read_file(tmp_path / "a.parquet")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{", "cannot be read"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read"),
        ("a.csv", b"x", "use one of"),
        ("a.jsonl", b'{"other": 1}\n', "holds no text"),
        ("a.jsonl", b"3\n", "holds no text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TunerError, match=message) as caught:
        list(read_file(tmp_path / name))
    assert name in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(TunerError, match="does not exist"):
        list(read_file(tmp_path / "no.txt"))


def test_options_choose_a_field_and_a_number(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "no", "body": "yes " * 9}) for _ in range(6)]
    path.write_text("\n".join(lines))
    found, _ = rows_of(f"{path}:key=body,num=3", nsamples=5)
    assert found.shape[0] == 3
    assert text_of({"body": "x"}, where="w", key="body") == "x"
    with pytest.raises(TunerError, match="unknown dataset option 'nmu'. Did you mean num"):
        rows_of(f"{path}:nmu=3")
    with pytest.raises(TunerError, match="whole number"):
        rows_of(f"{path}:num=many")


def test_an_empty_set_is_named(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(TunerError, match="is empty"):
        rows_of(tmp_path / "a.jsonl")
    with pytest.raises(TunerError, match="is empty"):
        rows_of([])
    with pytest.raises(TunerError, match="is empty"):
        rows_of([torch.empty(0, 8, dtype=torch.int64)])


def test_a_name_is_looked_up_on_the_hub_only_with_consent() -> None:
    with pytest.raises(TunerError, match="allow downloads"):
        rows_of("some/dataset")


@pytest.mark.parametrize(
    "dataset",
    [
        torch.ones(4, 8, dtype=torch.int64),
        [torch.ones(8, dtype=torch.int64)] * 4,
        [[1] * 8] * 4,
        [{"input_ids": torch.ones(2, 8, dtype=torch.int64)}] * 2,
        DataLoader(torch.ones(4, 8, dtype=torch.int64), batch_size=2),
    ],
    ids=["tensor", "tensors", "lists", "dicts", "loader"],
)
def test_tokens_are_taken_as_they_are(dataset) -> None:
    found, report = rows_of(dataset)
    assert torch.equal(found, torch.ones(4, 8, dtype=torch.int64))
    assert report.rows == 4


def test_a_loader_of_texts_is_tokenized() -> None:
    assert rows_of(DataLoader(LONG, batch_size=2))[0].shape == (4, 8)
    assert rows_of([{"text": t} for t in LONG])[0].shape == (4, 8)


def test_token_rows_shorter_than_seqlen_keep_their_length() -> None:
    assert rows_of(torch.ones(4, 5, dtype=torch.int64))[0].shape == (4, 5)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (3, "not understood"),
        ([object()], "neither text nor token ids"),
        ([torch.ones(8)], "whole numbers"),
    ],
)
def test_data_of_another_kind_is_refused(dataset, message) -> None:
    with pytest.raises(TunerError, match=message):
        rows_of(dataset)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(TunerError, match="needs a tokenizer"):
        calibration_rows(LONG, None, nsamples=1, seqlen=8, seed=0)


def test_the_embedded_text_needs_no_option() -> None:
    assert rows_of(None, nsamples=32, seqlen=128)[0].shape == (32, 128)


def test_rows_are_no_longer_than_the_model_can_take() -> None:
    config = type("Config", (), {"max_position_embeddings": 64})()
    assert check_seqlen(32, config, asked=True) == 32
    assert check_seqlen(2048, config, asked=False) == 64
    assert check_seqlen(2048, None, asked=True) == 2048
    with pytest.raises(TunerError, match="more than the model's 64 positions"):
        check_seqlen(65, config, asked=True)
