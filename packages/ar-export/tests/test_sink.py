from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ar_export import ExportError
from ar_export.sink import ar_open_sink, config_dtype
from ar_schemes import scheme


def test_a_format_of_others_is_left_to_them(request_for) -> None:
    assert ar_open_sink(request_for(format="svdquant_nunchaku")) is None


def test_nothing_is_visible_before_commit_and_nothing_is_left_after_abort(
    request_for, random_weights, tmp_path
) -> None:
    request = request_for()
    sink = ar_open_sink(request)
    for name, weight in random_weights(request.plan).items():
        sink.put(name, weight)
    assert not request.output.exists()
    sink.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_check_without_work_leaves_nothing(request_for, tmp_path) -> None:
    ar_open_sink(request_for()).abort()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_dead_run_are_not_mixed_in(request_for, random_weights, tmp_path) -> None:
    stale = tmp_path / ".out.999999999.partial"  # no process has this number
    stale.mkdir()
    (stale / "stale.safetensors").write_bytes(b"x")
    request = request_for()
    sink = ar_open_sink(request)
    for name, weight in random_weights(request.plan).items():
        sink.put(name, weight)
    path = sink.commit()
    assert not (path / "stale.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_output_that_is_not_empty_is_refused(request_for, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("")
    with pytest.raises(ExportError, match="is not empty"):
        ar_open_sink(request_for())


def test_an_output_that_is_a_file_is_refused(request_for, tmp_path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ExportError, match="is a file"):
        ar_open_sink(request_for())


def test_an_output_below_a_file_is_refused(request_for, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is not a directory"):
        ar_open_sink(request_for(output=tmp_path / "file" / "out"))


def test_overwriting_replaces_the_whole_directory(make, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    (tmp_path / "out" / "config.json").write_text("{}")
    path, _ = make(overwrite=True)
    assert not (path / "old.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_output_over_the_source_is_refused(request_for, tmp_path) -> None:
    source = tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="would replace the source"):
        ar_open_sink(request_for(source=source, overwrite=True))


def test_layers_that_cannot_be_carried_are_listed_together(request_for) -> None:
    request = request_for()
    with_activations = dataclasses.replace(
        scheme("W4A16"), activation=scheme("W8A16").weight, name="W4A8"
    )
    rows = tuple(dataclasses.replace(r, scheme=with_activations) for r in request.plan.rows[:2])
    plan = dataclasses.replace(request.plan, rows=rows)
    with pytest.raises(ExportError, match="cannot carry 2 layers") as caught:
        ar_open_sink(dataclasses.replace(request, plan=plan))
    assert "q_proj" in str(caught.value)
    assert "down_proj" in str(caught.value)


def test_asymmetric_weights_do_not_fit_the_symmetric_spelling(request_for) -> None:
    request = request_for(rules={"sym": False}, format="auto_round:auto_gptq")
    with pytest.raises(ExportError, match="holds symmetric weights"):
        ar_open_sink(request)


def test_a_tensor_is_written_once(request_for) -> None:
    sink = ar_open_sink(request_for())
    sink.put_tensor("a", torch.ones(2))
    with pytest.raises(ExportError, match="written twice"):
        sink.put_tensor("a", torch.ones(2))
    sink.abort()


def test_a_type_without_a_name_in_safetensors_is_refused(request_for) -> None:
    sink = ar_open_sink(request_for())
    with pytest.raises(ExportError, match="no element type"):
        sink.put_tensor("a", torch.ones(2, dtype=torch.complex64))
    sink.abort()


def test_side_files_come_along_and_weights_and_code_do_not(make, tmp_path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "modeling_x.py", "x.bin"):
        (source / name).write_text("x")
    (source / "model.safetensors.index.json").write_text("{}")
    (source / ".hidden.json").write_text("{}")
    path, _ = make(source=source)
    names = {p.name for p in path.iterdir()}
    assert {"tokenizer.json", "merges.txt", "chat_template.jinja"} <= names
    assert not names & {"modeling_x.py", "x.bin", ".hidden.json", "model.safetensors.index.json"}


def test_code_comes_along_where_the_config_names_it(make, tmp_path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "modeling_x.py").write_text("x = 1")
    path, _ = make(source=source, config={"auto_map": {"AutoModel": "modeling_x.X"}})
    assert (path / "modeling_x.py").is_file()


def test_a_model_in_memory_writes_its_own_side_files(make) -> None:
    path, _ = make(side=lambda folder: (folder / "tokenizer.json").write_text(json.dumps({})))
    assert (path / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16),
        ({}, torch.float32),
        ({"dtype": "nonsense"}, torch.float32),
    ],
)
def test_the_type_of_floats_is_read_from_the_config(config, dtype) -> None:
    assert config_dtype(config) is dtype


def test_overwriting_spares_what_is_no_checkpoint(request_for, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(ExportError, match="is no checkpoint and will not be replaced"):
        ar_open_sink(request_for(overwrite=True))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_the_root_of_the_file_system_is_refused(request_for) -> None:
    with pytest.raises(ExportError, match="root of the file system"):
        ar_open_sink(request_for(output=Path("/")))


def test_a_full_disk_is_said_in_plain_words(request_for, tmp_path, monkeypatch) -> None:
    sink = ar_open_sink(request_for())

    def refuse(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ExportError, match="No space left on device"):
        sink.put_tensor("a", torch.ones(2))
    monkeypatch.undo()
    sink.abort()
    assert list(tmp_path.iterdir()) == []


def test_parents_made_for_the_output_go_with_an_abort(request_for, tmp_path) -> None:
    sink = ar_open_sink(request_for(output=tmp_path / "a" / "b" / "out"))
    sink.put_tensor("a", torch.ones(2))
    sink.abort()
    assert list(tmp_path.iterdir()) == []
