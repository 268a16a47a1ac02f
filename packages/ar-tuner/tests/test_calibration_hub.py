"""What is asked of the hubs, with stand-ins in their place: nothing here uses a network."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest

from ar_tuner import TunerError
from ar_tuner.calibration import HubSet, Place, Query, calibration_rows
from ar_tuner.calibration.hub import SETS, use_modelscope
from ar_tuner.calibration.optional import load
from ar_tuner.calibration.sources import documents_of

QUERY = Query(allow_download=True, limit=5)
COLUMNS = {
    "pile-10k": {"text": "t", "meta": {}},
    "pile-val-backup": {"text": "t", "meta": {}},
    "CCI3-HQ": {"id": "1", "text": "t", "score": 4.0},
    "github-code-clean": {"code": "t", "path": "a.py", "license": "mit"},
    "OpenCodeInstruct": {"id": "1", "input": "t", "output": "o", "domain": "x"},
    "ultrachat_200k": {"prompt": "p", "messages": [{"role": "user", "content": "t"}]},
    "Ultra-FineWeb": {"content": "t", "score": 0.9, "source": "s"},
    "fineweb-edu": {"text": "t", "id": "1", "url": "u"},
    "new-title-chinese": {"title": "no", "content": "t"},
    "mbpp": {"task_id": 1, "text": "t", "code": "o", "test_list": []},
}
"""A record of each set with the columns its page lists."""


class Stream(list):
    """A stand-in for a stream of a hub."""

    def shuffle(self, *, seed, buffer_size):
        return Stream(self[seed % len(self) :] + self[: seed % len(self)])


@pytest.fixture
def hub(monkeypatch):
    """Replace `datasets`; return its calls and what it answers."""
    found = types.SimpleNamespace(calls=[], rows=lambda split: [{"text": split}] * 9)
    module = types.ModuleType("datasets")

    def load_dataset(path, name=None, *, split, streaming, data_files=None):
        found.calls.append((path, name or data_files, split, streaming))
        rows = found.rows(split)
        return Stream(rows) if streaming else rows

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delenv("AR_USE_MODELSCOPE", raising=False)
    return found


@pytest.fixture
def scope(monkeypatch):
    """Replace `modelscope` and choose it; return its calls."""
    calls = []
    module = types.ModuleType("modelscope")

    class MsDataset:
        @staticmethod
        def load(dataset_name, *, subset_name=None, split, use_streaming):
            calls.append((dataset_name, subset_name, split, use_streaming))
            return Stream([{"text": f"text {i}"} for i in range(9)])

    module.MsDataset = MsDataset
    monkeypatch.setitem(sys.modules, "modelscope", module)
    monkeypatch.setenv("AR_USE_MODELSCOPE", "1")
    return calls


@pytest.mark.parametrize("entry", SETS, ids=lambda entry: entry.name)
def test_a_registered_set_finds_its_text_in_its_own_columns(hub, entry) -> None:
    record = COLUMNS[entry.name]
    hub.rows = lambda split: [record]
    entry = HubSet(**{**vars(entry), "hub": entry.hub or Place("only/here")})
    documents = list(documents_of(entry.records(QUERY), where=entry.name))
    assert documents
    for document in documents:
        chat = () if isinstance(document, str) else document.messages
        assert document == "t" or chat[0] == ("user", "t")
        assert chat[1:] in ((), (("assistant", "o"),))


def test_the_sets_of_auto_round_are_known_by_their_names_there() -> None:
    known = {name for entry in SETS for name in (entry.name, *entry.aliases)}
    assert known >= {
        *("NeelNanda/pile-10k", "pile-10k", "swift/pile-val-backup", "BAAI/CCI3-HQ", "CCI3-HQ"),
        *("codeparrot/github-code-clean", "github-code-clean", "nvidia/OpenCodeInstruct"),
        *("opencode-instruct", "HuggingFaceH4/ultrachat_200k", "ultrachat_200k"),
        *("openbmb/Ultra-FineWeb", "madao33/new-title-chinese", "new-title-chinese", "mbpp"),
        *("google-research-datasets/mbpp", "HuggingFaceFW/fineweb-edu", "fineweb-edu"),
    }


@pytest.mark.parametrize(
    ("dataset", "calls"),
    [
        ("NeelNanda/pile-10k", [("NeelNanda/pile-10k", None, "train", False)]),
        ("pile-10k:split=train", [("NeelNanda/pile-10k", None, "train", False)]),
        (
            "ultrachat_200k:split=test_sft:key=text",
            [("HuggingFaceH4/ultrachat_200k", None, "test_sft", True)],
        ),
        ("fineweb-edu", [("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True)]),
        ("me/mine", [("me/mine", None, "train", True)]),
        (
            "me/mine:subset=en:split=a+b",
            [("me/mine", "en", "a", True), ("me/mine", "en", "b", True)],
        ),
    ],
)
def test_a_name_is_asked_of_the_hub_with_its_splits(hub, words, dataset, calls) -> None:
    hub.rows = lambda split: [{"text": "a bb ccc " + "d" * i} for i in range(9)]
    calibration_rows(dataset, words(), nsamples=2, seqlen=4, seed=0, allow_download=True)
    assert hub.calls == calls


def test_code_with_a_loading_script_is_read_from_its_files_and_licences(hub) -> None:
    code = next(entry for entry in SETS if entry.name == "github-code-clean")
    hub.rows = lambda split: [{"code": x, "license": x} for x in ("mit", "gpl-3.0", "apache-2.0")]
    records = [record["code"] for record in code.records(Query(allow_download=True, seed=3))]
    assert records == ["mit", "apache-2.0"]
    files = "hf://datasets/codeparrot/github-code-clean/data/train-*.parquet"
    assert hub.calls == [("parquet", files, "train", True)]
    with pytest.raises(TunerError, match="has no subset 'all-mit'"):
        code.records(Query(allow_download=True, subset="all-mit"))


def test_ultrachat_with_a_split_goes_through_the_template(hub, words) -> None:
    talk = [{"role": "user", "content": "a bb ccc"}, {"role": "assistant", "content": "dddd"}]
    hub.rows = lambda split: [{"prompt": "no", "messages": talk}]
    found, _ = calibration_rows(
        "HuggingFaceH4/ultrachat_200k:split=test_sft",
        words(template="any"),
        nsamples=1,
        seqlen=7,
        seed=0,
        allow_download=True,
    )
    assert found.tolist() == [[99, 5, 1, 2, 3, 10, 4]]  # <s> user: a bb ccc assistant: dddd
    assert hub.calls == [("HuggingFaceH4/ultrachat_200k", None, "test_sft", True)]


def test_a_stream_is_shuffled_by_the_seed_and_read_up_to_the_limit(hub) -> None:
    hub.rows = lambda split: [{"text": f"{split}{i}"} for i in range(9)]
    entry = HubSet("x", hub=Place("me/x", ("a", "b")), key="text")
    found = list(entry.records(Query(allow_download=True, limit=2, seed=3)))
    assert found == ["a3", "a4", "b3", "b4"]
    assert list(entry.records(Query(("b",), allow_download=True, limit=1, seed=4))) == ["b4"]


def test_without_a_network_the_cache_is_read_instead_of_a_stream(hub, monkeypatch) -> None:
    config = types.SimpleNamespace(HF_HUB_OFFLINE=True)
    monkeypatch.setattr(sys.modules["datasets"], "config", config, raising=False)
    entry = HubSet("x", hub=Place("me/x"), key="text")
    assert list(entry.records(Query(allow_download=True, limit=2))) == ["train"] * 9
    assert hub.calls == [("me/x", None, "train", False)]


def test_a_set_with_a_field_of_its_own_still_lets_the_user_choose_one(hub, words) -> None:
    hub.rows = lambda split: [{"text": "no", "body": f"a bb {'c' * i}"} for i in range(4, 9)]
    found, _ = calibration_rows(
        "pile-10k:key=body", words(), nsamples=1, seqlen=3, seed=0, allow_download=True
    )
    assert found[0, :2].tolist() == [1, 2]


def test_a_name_is_looked_up_whole(hub, words) -> None:
    hub.rows = lambda split: [{"text": "a bb ccc"}]
    calibration_rows("me/code", words(), nsamples=1, seqlen=2, seed=0, allow_download=True)
    assert hub.calls[0][0] == "me/code"
    with pytest.raises(
        TunerError, match="unknown calibration dataset 'pile'. Did you mean pile-10k"
    ):
        calibration_rows("pile", words(), nsamples=1, seqlen=2, seed=0)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("pile-10k", {}, "is on the Hugging Face hub: allow downloads"),
        ("me/mine", {}, "unknown calibration dataset 'me/mine'.*allow downloads"),
        ("swift/pile-val-backup", {"allow_download": True}, "set AR_USE_MODELSCOPE=1"),
        (
            "ultrachat_200k:split=train",
            {"allow_download": True},
            "no split 'train'. It has: train_sft",
        ),
    ],
)
def test_what_a_hub_cannot_give_is_refused_before_asking(
    hub, words, dataset, options, message
) -> None:
    with pytest.raises(TunerError, match=message):
        calibration_rows(dataset, words(), nsamples=1, seqlen=2, seed=0, **options)
    assert hub.calls == []


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), ValueError("Bad split: train"), RuntimeError("")]
)
def test_what_a_hub_answers_is_passed_on(hub, error) -> None:
    def fail(split):
        raise error

    hub.rows = fail
    reason = str(error) or "RuntimeError"
    with pytest.raises(TunerError, match=f"'x' cannot be loaded: {reason}"):
        list(HubSet("x", hub=Place("me/x")).records(QUERY))


def test_a_record_without_the_field_of_its_set_is_refused(hub) -> None:
    hub.rows = lambda split: [{"body": "x"}]
    entry = HubSet("x", hub=Place("me/x"), key="text")
    with pytest.raises(TunerError, match="a record has no field 'text', only body.*:key=NAME"):
        list(entry.records(QUERY))


def test_modelscope_answers_where_the_environment_says_so(scope, words) -> None:
    for dataset in ("pile-10k", "swift/pile-val-backup", "me/mine:subset=en:split=dev"):
        rows, _ = calibration_rows(
            dataset, words(), nsamples=2, seqlen=2, seed=0, allow_download=True
        )
        assert rows.tolist()[0] == [4, 1]
    pile = ("swift/pile-val-backup", "default", "validation")
    assert scope == [(*pile, False), (*pile, True), ("me/mine", "en", "dev", True)]


def test_modelscope_needs_consent_as_well(scope, words) -> None:
    with pytest.raises(TunerError, match="is on ModelScope: allow downloads"):
        calibration_rows("pile-10k", words(), nsamples=2, seqlen=2, seed=0)
    assert scope == []


def test_an_absent_library_is_named_before_work(monkeypatch) -> None:
    monkeypatch.setenv("AR_USE_MODELSCOPE", "true")
    monkeypatch.delitem(sys.modules, "modelscope", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TunerError, match="needs the package modelscope.*pip install modelscope"):
        SETS[0].records(QUERY)
    with pytest.raises(TunerError, match="a thing needs the package not_there_at_all"):
        load("not_there_at_all", "a thing")


def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch) -> None:
    for value, on in {"1": True, "True": True, "0": False, "false": False, "": False}.items():
        monkeypatch.setenv("AR_USE_MODELSCOPE", value)
        assert use_modelscope() is on
    monkeypatch.setenv("AR_USE_MODELSCOPE", "maybe")
    with pytest.raises(TunerError, match="AR_USE_MODELSCOPE='maybe': use 1 or 0"):
        use_modelscope()
