from __future__ import annotations

import json

import pytest
import torch

from ar_kernels import data_type, equal
from ar_schemes import LayerInfo, LayerRules, make_plan, scheme
from ar_tuner import TunerError, events
from ar_tuner.progress import Eta, peak_bytes
from ar_tuner.recipes import RECIPES, auto_lr
from ar_tuner.run import Run, fingerprint

PRINT = {"settings": "a", "plan": "b"}


def weight(symmetric: bool = True):
    spec = scheme("W4A16").with_overrides({"group_size": 16, "sym": symmetric}).weight
    values = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    kind = data_type("int")
    return kind.quantize(values, spec, kind.parameters(values, spec))


def start(folder, *, resume=False, print_=PRINT) -> Run:
    return Run.open(folder / "run", {"iters": 3}, print_, resume=resume)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_a_finished_block_comes_back_to_the_bit(tmp_path, symmetric) -> None:
    saved = weight(symmetric)
    with start(tmp_path) as run:
        run.save_block(0, "b0", {"b0.x": saved}, {"loss": 0.5})
    with start(tmp_path, resume=True) as run:
        assert run.finished == {0}
        weights, facts = run.load_block(0)
    assert equal(weights["b0.x"], saved)
    assert facts == {"loss": 0.5}


def test_a_torn_journal_line_counts_for_nothing_and_is_closed_off(tmp_path) -> None:
    with start(tmp_path) as run:
        run.save_block(0, "b0", {"b0.x": weight()}, {})
    journal = tmp_path / "run" / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"index": 1, "na')
    with start(tmp_path, resume=True) as run:
        assert run.finished == {0}
        run.save_block(1, "b1", {"b1.x": weight()}, {})
    with start(tmp_path, resume=True) as run:
        assert run.finished == {0, 1}


def test_a_changed_block_file_is_refused(tmp_path) -> None:
    with start(tmp_path) as run:
        run.save_block(0, "b0", {"b0.x": weight()}, {})
    file = next((tmp_path / "run" / "blocks").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with start(tmp_path, resume=True) as run, pytest.raises(TunerError, match="was changed"):
        run.load_block(0)


def test_finished_blocks_are_not_thrown_away_unasked(tmp_path) -> None:
    with start(tmp_path) as run:
        run.save_block(0, "b0", {"b0.x": weight()}, {})
    with pytest.raises(TunerError, match="interrupted run with 1 finished blocks"):
        start(tmp_path)


def test_a_run_without_finished_blocks_may_begin_anew(tmp_path) -> None:
    with start(tmp_path):
        pass
    with start(tmp_path) as run:
        assert run.finished == frozenset()


def test_another_runs_directory_is_not_resumed(tmp_path) -> None:
    with start(tmp_path) as run:
        run.save_block(0, "b0", {"b0.x": weight()}, {})
    with pytest.raises(TunerError, match="plan differ"):
        start(tmp_path, resume=True, print_={"settings": "a", "plan": "other"})


def test_a_finished_run_is_not_resumed_but_may_begin_anew(tmp_path) -> None:
    with start(tmp_path) as run:
        run.save_block(0, "b0", {"b0.x": weight()}, {})
        run.finish(tmp_path / "out")
    assert not list((tmp_path / "run" / "blocks").iterdir())
    with pytest.raises(TunerError, match="finished; there is nothing to resume"):
        start(tmp_path, resume=True)
    with start(tmp_path):
        pass


def test_one_process_works_in_a_run_directory(tmp_path) -> None:
    with start(tmp_path), pytest.raises(TunerError, match="another process"):
        start(tmp_path)


def test_a_directory_with_other_files_is_left_alone(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(TunerError, match=r"holds other files \(thesis.tex\)"):
        start(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TunerError, match="is a file"):
        Run.open(tmp_path / "file", {}, PRINT, resume=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ('{"version": 99, "fingerprint": {}}', "another version")],
)
def test_a_run_file_that_is_not_ours_is_refused(tmp_path, text, message) -> None:
    with start(tmp_path):
        pass
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(TunerError, match=message):
        start(tmp_path, resume=True)


def test_events_are_lines_that_a_program_can_read(tmp_path) -> None:
    with start(tmp_path) as run:
        run.record(events.Note("info", "hello"))
        run.record(events.BlockStarted(0, 2, "b0"))
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert (first["kind"], first["text"]) == ("note", "hello")
    assert json.loads(lines[1])["name"] == "b0"


def test_a_fingerprint_names_what_differs(tmp_path) -> None:
    layers = [LayerInfo("b.x", 32, 64, "b")]
    plans = [
        make_plan(layers, LayerRules(scheme(s).with_overrides({"group_size": 32})))
        for s in ("W4A16", "W3A16")
    ]
    models = [torch.nn.Linear(4, 4) for _ in range(2)]
    rows = torch.ones(2, 4, dtype=torch.int64)

    def of(settings=1, plan=0, tokens=rows, model=0):
        return fingerprint({"a": settings}, plans[plan], tokens, None, models[model])

    base = of()
    assert of() == base
    changes = {
        "settings": of(settings=2),
        "plan": of(plan=1),
        "calibration": of(tokens=rows + 1),
        "weights": of(model=1),
    }
    for name, other in changes.items():
        assert [k for k in base if base[k] != other[k]] == [name]


def test_time_left_is_told_after_the_first_block_of_this_process() -> None:
    eta = Eta(4)
    eta.skip()
    assert eta.seconds_left() is None
    eta.done()
    assert eta.seconds_left() > 0
    eta.done()
    eta.done()
    assert eta.seconds_left() == 0


def test_memory_is_told_in_bytes() -> None:
    assert 10**7 < peak_bytes() < 10**12


def test_recipes_have_the_names_users_know() -> None:
    assert [RECIPES[n].iters for n in ("best", "default", "light", "rtn")] == [1000, 200, 50, 0]
    assert auto_lr(1000, 4) == 1 / 1000
    assert auto_lr(200, 4) == 1 / 200
    assert auto_lr(1000, 2) == 2 / 1000
