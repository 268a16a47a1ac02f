from __future__ import annotations

import json
import random
import types

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ar_tuner import AutoRound, TunerError, events
from ar_tuner.calibration import (
    calibration_rows,
    check_dataset,
    check_ids,
    check_seqlen,
    split_rows,
)
from ar_tuner.calibration.sources import sample

LONG = [f"{'x' * i} a bb ccc dddd eeeee ffffff ggggggg" for i in range(1, 7)]


@pytest.fixture
def rows_of(words):
    """Make rows of a dataset with a tokenizer of words."""

    def make(dataset, *, nsamples=4, seqlen=8, seed=0, tokenizer=None, **kwargs):
        return calibration_rows(
            dataset, tokenizer or words(), nsamples=nsamples, seqlen=seqlen, seed=seed, **kwargs
        )

    return make


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def texts_of(report):
    return [note.text for note in report.notes()]


def test_long_texts_are_cut_in_the_order_of_the_seed(rows_of) -> None:
    first, report = rows_of(LONG)
    assert first.shape == (4, 8)
    assert first.dtype == torch.int64
    assert report.notes() == []
    orders = [rows_of(LONG, seed=s)[0][:, 0].tolist() for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    shuffled = list(range(1, 7))
    random.Random(0).shuffle(shuffled)
    assert orders[0] == shuffled[:4]


def test_the_global_random_state_is_neither_read_nor_changed(rows_of) -> None:
    random.seed(5)
    torch.manual_seed(5)
    before = (random.getstate(), torch.get_rng_state())
    once, _ = rows_of(LONG)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(6)
    assert torch.equal(once, rows_of(LONG)[0])


def test_short_texts_are_packed_instead_of_dropped(rows_of) -> None:
    found, report = rows_of([f"aa bbb {'c' * i}" for i in range(1, 10)], seqlen=8)
    assert found[:, 0].tolist() == found[:, 4].tolist() == [2] * 4
    assert found[:, 3].tolist() == found[:, 7].tolist() == [0] * 4
    assert report.sets[0].packed == 4
    assert "4 are texts joined" in texts_of(report)[0]
    assert report.notes()[0].level == "info"


def test_fewer_rows_than_asked_are_reported(rows_of) -> None:
    _, report = rows_of(LONG, nsamples=100)
    assert "6 rows of 8 tokens, fewer than the 100 asked for" in texts_of(report)[0]
    assert report.notes()[0].level == "warning"


def test_too_little_text_for_one_row_is_refused(rows_of) -> None:
    with pytest.raises(TunerError, match="fewer than seqlen 8 tokens"):
        rows_of(["one two"])


def test_duplicate_texts_are_used_once_and_reported(rows_of) -> None:
    found, report = rows_of([*LONG, *LONG], nsamples=12)
    assert len({tuple(row.tolist()) for row in found}) == len(found) == 6
    assert "left out of dataset: 6 duplicates, 0 rows" in texts_of(report)[-1]


def test_rows_that_are_equal_are_used_once_even_of_different_texts(rows_of) -> None:
    found, report = rows_of([LONG[0], LONG[0] + " other end"], nsamples=2)
    assert len(found) == 1
    assert report.sets[0].duplicates == 1


def test_rows_that_look_like_padding_are_left_out_and_reported(rows_of) -> None:
    found, report = rows_of([*LONG, "a bb ccc " + "x " * 9], nsamples=7)
    assert len(found) == 6
    assert "1 rows that are mostly one token" in texts_of(report)[-1]
    with pytest.raises(TunerError, match="as in padding. Give running text"):
        rows_of(["x " * 20])


def test_every_distinct_window_is_there_beginnings_first(rows_of) -> None:
    chance = random.Random(1)
    texts = [
        " ".join("x" * chance.randrange(1, 30) for _ in range(chance.randrange(40, 90)))
        for _ in range(30)
    ]
    found, report = rows_of(texts, nsamples=500, seqlen=8)
    ids = [list(map(len, text.split())) for text in texts]
    windows = {tuple(t[i : i + 8]) for t in ids for i in range(0, len(t) - 7, 8)}
    assert {tuple(row.tolist()) for row in found} == windows
    assert len(found) == len(windows)
    assert {tuple(row.tolist()) for row in found[:30]} == {tuple(t[:8]) for t in ids}
    train, held = split_rows(report.documents, 0.1, 0)
    beside = {report.documents[r] for r in train} & {report.documents[r] for r in held}
    assert not beside


def test_sets_give_their_numbers_and_share_what_is_left(tmp_path, rows_of) -> None:
    paths = [
        write(tmp_path / f"{name}.jsonl", [f"{name * 9} {text}" for text in LONG])
        for name in ("a", "bb", "ccc")
    ]
    request = f"{paths[0]}:num=2,{paths[1]},{paths[2]}"
    found, report = rows_of(request, nsamples=8, seqlen=9, seed=1)
    assert [n for _, n in report.sources] == [2, 3, 3]
    assert texts_of(report) == [
        f"calibration: 8 rows: 2 from {paths[0]}, 3 from {paths[1]}, 3 from {paths[2]}"
    ]
    assert torch.equal(found, rows_of(request, nsamples=8, seqlen=9, seed=1)[0])


def test_a_set_that_cannot_give_its_rows_is_reported_and_others_step_in(tmp_path, rows_of) -> None:
    few = write(tmp_path / "few.jsonl", LONG[:1])
    many = write(tmp_path / "many.jsonl", [f"{'y' * 9} {text}" for text in LONG])
    _, report = rows_of(f"{few},{many}", nsamples=6, seqlen=8)
    assert [n for _, n in report.sources] == [1, 5]
    assert f"calibration: {few} gave 1 of the 3 rows due from it" in texts_of(report)


def test_more_rows_by_num_than_nsamples_become_shares_with_a_warning(tmp_path, rows_of) -> None:
    path = write(tmp_path / "a.jsonl", LONG)
    _, report = rows_of(f"{path}:num=600", nsamples=3)
    assert report.rows == 3
    assert f"{path} has 3 rows for num=600: nsamples is less" in texts_of(report)[0]


def test_num_is_a_number_of_rows(tmp_path, rows_of) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "no", "body": text} for text in LONG])
    found, report = rows_of(f"{path}:key=body:num=3", nsamples=5)
    assert found.shape == (3, 8)
    assert report.notes() == []


def test_the_same_set_twice_with_other_splits_and_numbers_does_not_collide(
    tmp_path, rows_of
) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"train": LONG, "test": [text.replace("a", "aaaaaaaaa") for text in LONG]})
    )
    path = tmp_path / "a.json"
    found, report = rows_of(f"{path}:split=train:num=2,{path}:split=test:num=5", nsamples=9)
    assert report.sources == ((f"{path}:split=train", 2), (f"{path}:split=test", 5))
    assert sorted(found[:, 1].tolist()) == [1] * 2 + [9] * 5


def test_sets_that_overlap_give_no_row_twice(tmp_path, rows_of) -> None:
    path = write(tmp_path / "a.jsonl", LONG)
    found, report = rows_of(f"{path}:num=3,{path}:num=3", nsamples=6)
    assert sorted(found[:, 0].tolist()) == [1, 2, 3, 4, 5, 6]
    assert sorted(report.documents) == [(i,) for i in range(6)]


def test_concat_as_documented_gives_rows(tmp_path, rows_of) -> None:
    path = write(tmp_path / "a.jsonl", ["aa bbb cccc", "d ee fff gggg hhhhh", "iiiiii jjjjjjj"])
    for spelling in ("concat", "concat=True", "concat=true:num=2"):
        found, report = rows_of(f"{path}:{spelling}", nsamples=2, seqlen=4)
        assert found.shape == (2, 4)
        assert report.sets[0].packed == 2


def test_a_text_file_is_calibration_data(tmp_path, rows_of) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(LONG))
    assert rows_of(str(tmp_path / "a.txt"))[0].shape == (4, 8)


def test_a_name_with_a_comma_is_a_file_where_there_is_one(tmp_path, rows_of) -> None:
    path = write(tmp_path / "a,b:c.jsonl", LONG)
    assert rows_of(str(path))[0].shape == rows_of(path)[0].shape == (4, 8)
    assert rows_of(f"'{path}':num=2")[0].shape == (2, 8)


def test_a_path_is_never_a_registered_name(tmp_path, monkeypatch, rows_of) -> None:
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").mkdir()
    write(tmp_path / "default" / "a.jsonl", LONG)
    assert rows_of(Path("default"))[1].sets[0].label == "./default"
    assert rows_of("default", seqlen=64)[1].sets[0].label == "default"


def test_an_empty_set_is_named(tmp_path, rows_of) -> None:
    (tmp_path / "a.jsonl").write_text('" "\n')
    with pytest.raises(TunerError, match=r"a.jsonl' is empty"):
        rows_of(tmp_path / "a.jsonl")
    for nothing in ([], [torch.empty(0, 8, dtype=torch.int64)], [" "]):
        with pytest.raises(TunerError, match="is empty"):
            rows_of(nothing)


TOKENS = torch.arange(32).reshape(4, 8)


@pytest.mark.parametrize(
    "dataset",
    [
        TOKENS,
        TOKENS.numpy(),
        list(TOKENS),
        TOKENS.tolist(),
        [{"input_ids": TOKENS[:2]}, {"input_ids": TOKENS[2:]}],
        [{"input_ids": row} for row in TOKENS.tolist()],
        DataLoader(TOKENS, batch_size=2),
        DataLoader(TensorDataset(TOKENS), batch_size=2),
        [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}],
        {"input_ids": TOKENS},
    ],
    ids=[
        "tensor",
        "array",
        "tensors",
        "lists",
        "batches",
        "dicts",
        "loader",
        "tuples",
        "masked",
        "dict",
    ],
)
def test_token_rows_are_taken_as_they_are_in_their_order(rows_of, dataset) -> None:
    found, report = rows_of(dataset, tokenizer=None)
    assert torch.equal(found, TOKENS)
    assert (report.rows, report.notes()) == (4, [])
    assert torch.equal(rows_of(dataset, nsamples=2)[0], TOKENS[:2])


def test_token_rows_that_are_equal_or_padded_are_kept_and_reported(rows_of) -> None:
    found, report = rows_of(torch.ones(4, 8, dtype=torch.int64))
    assert found.shape == (4, 8)
    assert (
        "3 duplicates, 4 rows that are mostly one token; rows given as tokens are"
        in (texts_of(report)[0])
    )
    assert report.documents == ((0,),) * 4


def test_what_a_mask_says_is_padding_is_cut_off_and_the_rest_packed(rows_of) -> None:
    mask = torch.ones_like(TOKENS)
    mask[:, 5:] = 0
    mask[0, 5] = 1
    found, _ = rows_of([{"input_ids": TOKENS, "attention_mask": mask}], nsamples=9)
    kept = [row[used == 1].tolist() for row, used in zip(TOKENS, mask, strict=True)]
    joined = [token for row in kept for token in (*row, 0)]
    assert found.flatten().tolist() == joined[:24]
    with pytest.raises(TunerError, match=r"attention_mask \[1, 3\] does not fit"):
        rows_of([{"input_ids": TOKENS, "attention_mask": [1, 1, 0]}])


def test_token_rows_shorter_than_seqlen_keep_their_length(rows_of) -> None:
    assert rows_of(TOKENS[:, :5])[0].shape == (4, 5)


def test_token_rows_longer_than_seqlen_are_cut_into_windows(rows_of) -> None:
    found, _ = rows_of(TOKENS, nsamples=9, seqlen=4)
    assert torch.equal(found, torch.cat([TOKENS[:, :4], TOKENS[:, 4:]]))


def test_tokens_of_a_file_need_no_tokenizer(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [{"input_ids": row} for row in TOKENS.tolist()])
    found, _ = calibration_rows(path, None, nsamples=4, seqlen=8, seed=0)
    assert sorted(found.tolist()) == TOKENS.tolist()


def test_a_loader_of_texts_is_tokenized(rows_of) -> None:
    assert rows_of(DataLoader(LONG, batch_size=2))[0].shape == (4, 8)
    assert rows_of([{"text": t} for t in LONG])[0].shape == (4, 8)
    assert rows_of([{"text": LONG}])[0].shape == (4, 8)
    assert rows_of(iter(LONG))[0].shape == (4, 8)


def test_an_endless_stream_is_read_no_further_than_is_needed(rows_of) -> None:
    def endless():
        number = 0
        while True:
            number += 1
            yield f"{LONG[number % 6]} {number}"

    found, _ = rows_of(endless(), nsamples=3)
    assert found.shape == (3, 8)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (3, "not understood"),
        ([object()], "neither text nor token ids"),
        ([torch.ones(8)], "whole numbers"),
        ({"train": LONG}, r"a mapping \(train\): give one of its values"),
    ],
)
def test_data_of_another_kind_is_refused(rows_of, dataset, message) -> None:
    with pytest.raises(TunerError, match=message):
        rows_of(dataset)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(TunerError, match="needs a tokenizer"):
        calibration_rows(LONG, None, nsamples=1, seqlen=8, seed=0)


def test_the_embedded_text_needs_no_option(rows_of) -> None:
    assert rows_of(None, nsamples=32, seqlen=128)[0].shape == (32, 128)
    with pytest.raises(TunerError, match="has no splits"):
        rows_of("default:split=train")


def test_rows_are_no_longer_than_the_model_can_take() -> None:
    config = types.SimpleNamespace(max_position_embeddings=64)
    assert check_seqlen(32, config, asked=True) == 32
    assert check_seqlen(2048, config, asked=False) == 64
    assert check_seqlen(2048, None, asked=True) == 2048
    with pytest.raises(TunerError, match="more than the model's 64 positions"):
        check_seqlen(65, config, asked=True)


@pytest.mark.parametrize(("ids", "wrong"), [([0, 128], 128), ([-1, 5], -1)])
def test_token_ids_the_model_does_not_have_are_refused(ids, wrong) -> None:
    config = types.SimpleNamespace(vocab_size=128)
    check_ids(torch.tensor([[0, 127]]), config)
    check_ids(torch.tensor([[0, 999]]), None)
    with pytest.raises(TunerError, match=f"token id {wrong} is outside the model's vocabulary"):
        check_ids(torch.tensor([ids]), config)


def test_a_sample_keeps_what_fits_and_every_document_is_equally_likely() -> None:
    texts = [f"{i:03d}" for i in range(100)]
    assert sample(iter(texts), limit=100, seed=1) == texts
    counts = dict.fromkeys(texts, 0)
    for seed in range(400):
        chosen = sample(iter(texts), limit=10, seed=seed)
        assert len(chosen) == 10
        for text in chosen:
            counts[text] += 1
    assert min(counts.values()) > 15  # mean 40, standard deviation 6
    assert max(counts.values()) < 70


def test_a_sample_holds_no_more_characters_than_allowed() -> None:
    held = sample(("x" * 100 for _ in range(1000)), limit=500, seed=0, characters=2000)
    assert sum(map(len, held)) == 2000
    assert sample(["x" * 100], limit=5, seed=0, characters=10) == ["x" * 100]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("nowhere.jsonl", "nowhere.jsonl' does not exist"),
        ("some/name", "allow downloads"),
        ("x" * 5000, "unknown calibration dataset"),
        ("default:nmu=3", "unknown dataset option 'nmu'"),
        ("default:num=8,default", "no row is left"),
    ],
)
def test_a_wrong_dataset_is_refused_before_any_work(model, dataset, message) -> None:
    with pytest.raises(TunerError, match=message):
        AutoRound(model(), dataset=dataset, nsamples=8)


def test_what_is_not_used_is_checked_too_but_not_shared_out(model) -> None:
    AutoRound(model(), dataset="default,default", recipe="rtn")
    with pytest.raises(TunerError, match="does not exist"):
        AutoRound(model(), dataset="nowhere.jsonl", recipe="rtn")
    check_dataset([3], nsamples=1, allow_download=False)


def test_a_run_tells_where_its_rows_come_from(model, words, tmp_path) -> None:
    first = write(tmp_path / "a.jsonl", LONG)
    seen = []
    AutoRound(
        model(),
        words(),
        dataset=f"{first}:num=2,default",
        on_event=seen.append,
        **{"iters": 1, "nsamples": 4, "seqlen": 8, "batch_size": 2, "group_size": 32},
    ).quantize()
    ready = next(e for e in seen if isinstance(e, events.CalibrationReady))
    assert ready.sources == ((str(first), 2), ("default", 2))
    assert any(isinstance(e, events.Note) and "2 from default" in e.text for e in seen)


def test_a_run_refuses_tokens_its_model_does_not_have(model) -> None:
    job = AutoRound(model(), dataset=torch.full((4, 8), 500), iters=1, group_size=32)
    with pytest.raises(TunerError, match="token id 500"):
        job.quantize()
