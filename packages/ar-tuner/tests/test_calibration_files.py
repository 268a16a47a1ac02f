from __future__ import annotations

import json
import sys

import pytest

from ar_tuner import TunerError
from ar_tuner.calibration.files import is_local, read_path


@pytest.mark.parametrize(
    ("name", "content", "records"),
    [
        (
            "a.txt",
            "first paragraph\nof two lines\n \n\nsecond one\n",
            ["first paragraph\nof two lines", "second one"],
        ),
        ("a.json", '["one", {"text": "two"}]', ["one", {"text": "two"}]),
        ("b.json", '{"data": [{"content": "one"}], "version": 1}', [{"content": "one"}]),
        ("c.json", '{"train": ["one"], "test": ["two"]}', ["one", "two"]),
        ("d.json", '{"0": "one", "1": {"text": "two"}}', ["one", {"text": "two"}]),
        ("e.json", '{"text": "one"}', [{"text": "one"}]),
        ("f.json", '{"text": ["one", "two"]}', ["one", "two"]),
        (
            "g.json",
            '{"messages": [{"role": "user", "content": "x"}]}',
            [{"messages": [{"role": "user", "content": "x"}]}],
        ),
        ("h.json", '{"input_ids": [1, 2]}', [{"input_ids": [1, 2]}]),
        ("i.json", '{"input_ids": [[1, 2], [3]]}', [[1, 2], [3]]),
        ("j.json", '"one"', ["one"]),
        (
            "a.jsonl",
            '{"text": "one"}\n\n"two\\u2028still two"\n',
            [{"text": "one"}, "two\u2028still two"],
        ),
        ("b.jsonl", '{"text": "line\u2028separator"}\n', [{"text": "line\u2028separator"}]),
        ("c.jsonl", '\ufeff"marked"\n', ["marked"]),
        ("A.JSONL", '"upper"\n', ["upper"]),
    ],
)
def test_a_file_of_any_kind_gives_its_records(tmp_path, name, content, records) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert list(read_path(tmp_path / name)) == records


def test_a_parquet_file_gives_its_records(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert list(read_path(tmp_path / "a.parquet")) == [{"text": "one"}, {"text": "two"}]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(TunerError, match=r"a.parquet.*pip install pyarrow"):
        list(read_path(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b"{"), ("a.txt", b"\xff\xfe\xff"), ("a.json", b"{"), ("a.parquet", b"no")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content) -> None:
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TunerError, match=f"{name}.*cannot be read"):
        list(read_path(tmp_path / name))


def test_what_cannot_be_opened_is_refused_before_reading(tmp_path) -> None:
    with pytest.raises(TunerError, match="does not exist"):
        read_path(tmp_path / "no.txt")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(TunerError, match="use one of .parquet, .jsonl, .json, .txt"):
        read_path(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text('"x"')
    with pytest.raises(TunerError, match="has no splits, so split=train means nothing"):
        read_path(tmp_path / "a.jsonl", splits=("train",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TunerError, match="holds no .parquet"):
        read_path(tmp_path / "empty")


def test_splits_of_a_json_object_are_its_lists(tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": ["one"], "validation": ["two"], "test": ["three"]}))
    assert list(read_path(path, splits=("train", "test"))) == ["one", "three"]
    with pytest.raises(TunerError, match="no split 'dev'. It has: train, validation, test"):
        list(read_path(path, splits=("dev",)))
    path.write_text('["one"]')
    with pytest.raises(TunerError, match="It has: none"):
        list(read_path(path, splits=("train",)))


def test_a_directory_gives_its_files_in_the_order_of_their_names(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    for name, word in [("train-1", "b"), ("train-0", "a"), ("test", "c"), ("training", "d")]:
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(word))
    (tmp_path / "README.txt").write_text("not a record")
    assert list(read_path(tmp_path)) == ["c", "a", "b", "d"]
    assert list(read_path(tmp_path, splits=("train",))) == ["a", "b"]
    with pytest.raises(TunerError, match="has no split 'dev'"):
        read_path(tmp_path, splits=("dev",))


def test_a_saved_set_is_read_with_its_splits(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"text": "one"}])
    two = datasets.Dataset.from_list([{"text": "two"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(tmp_path / "both")
    assert list(read_path(tmp_path / "one")) == [{"text": "one"}]
    assert list(read_path(tmp_path / "both")) == [{"text": "one"}, {"text": "two"}]
    assert list(read_path(tmp_path / "both", splits=("test",))) == [{"text": "two"}]
    with pytest.raises(TunerError, match="has no split 'dev'. It has: train, test"):
        read_path(tmp_path / "both", splits=("dev",))
    with pytest.raises(TunerError, match="has no split 'dev'"):
        read_path(tmp_path / "one", splits=("dev",))


def test_a_name_is_a_file_if_it_looks_like_one_or_is_there(tmp_path) -> None:
    assert is_local("nowhere.jsonl")
    assert is_local(str(tmp_path))
    assert not is_local("owner/name")
