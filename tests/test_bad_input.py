"""Bad input: a clear error before any work, exit status 2, nothing written."""

from __future__ import annotations

import json

import pytest
import torch

from ar_cli.main import run as ar_main
from ar_schemes import ArError
from ar_tuner import AutoRound


@pytest.fixture
def refused(capsys, tmp_path):
    """Run `ar quantize ... --output` and return what it says when it refuses."""

    def run(*args: str, output: str = "out") -> str:
        before = sorted(tmp_path.rglob("*"))
        status = ar_main(["quantize", *args, "--output", str(tmp_path / output)])
        captured = capsys.readouterr()
        assert status == 2
        assert captured.out == ""
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        assert "Traceback" not in captured.err
        return captured.err

    return run


def test_a_missing_model_is_named(refused) -> None:
    message = refused("no-such-model")
    assert "'no-such-model' does not exist" in message
    assert "directory" in message


def test_an_unknown_scheme_names_the_nearest(refused, demo_model) -> None:
    message = refused(str(demo_model), "--scheme", "W4A61")
    assert "unknown scheme 'W4A61'. Did you mean W4A16" in message


def test_a_scheme_that_the_format_cannot_hold_says_so(refused, demo_model) -> None:
    message = refused(str(demo_model), "--scheme", "INT8")
    assert "cannot carry 28 layers" in message
    assert "integers with quantized activations" in message


def test_a_group_size_that_does_not_divide_lists_every_layer(refused, demo_model) -> None:
    message = refused(str(demo_model), "--group-size", "96")
    assert "96" in message
    config = json.loads((demo_model / "config.json").read_text())
    layers = config["num_hidden_layers"]
    for index in range(layers):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"):
            assert f"model.layers.{index}.{name}" in message


def test_an_empty_calibration_set_is_named(refused, demo_model, tmp_path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    message = refused(str(demo_model), "--dataset", str(empty))
    assert "empty.jsonl" in message
    assert "empty" in message


def test_a_calibration_set_that_does_not_exist_is_named(refused, demo_model) -> None:
    assert "nowhere.jsonl" in refused(str(demo_model), "--dataset", "nowhere.jsonl")


def test_an_output_that_cannot_be_written_is_named(refused, demo_model, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    message = refused(str(demo_model), output="file/out")
    assert "cannot be written" in message


def test_an_output_that_is_not_empty_is_left_alone(refused, demo_model, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me")
    message = refused(str(demo_model))
    assert "not empty" in message
    assert "--overwrite" in message
    assert (tmp_path / "out" / "precious.txt").read_text() == "keep me"


def test_an_unknown_option_names_the_nearest(refused, demo_model) -> None:
    message = refused(str(demo_model), "--shceme", "W4A16")
    assert "--shceme" in message
    assert "--scheme" in message


def test_an_unknown_recipe_names_the_known_ones(refused, demo_model) -> None:
    message = refused(str(demo_model), "--recipe", "lihgt")
    assert "lihgt" in message
    assert "light" in message


def test_an_unknown_format_is_refused(refused, demo_model) -> None:
    assert "auto_ruond" in refused(str(demo_model), "--format", "auto_ruond")


def test_neither_model_nor_demo_is_refused(refused) -> None:
    assert "--demo" in refused()


def test_an_unknown_api_keyword_names_the_nearest(demo_model) -> None:
    with pytest.raises(ArError, match="unknown argument 'iterss'. Did you mean iters"):
        AutoRound(demo_model, iterss=3)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("iters", -1), ("nsamples", 0), ("seqlen", 1), ("batch_size", 0), ("lr", 2.0)],
)
def test_a_number_out_of_range_is_refused(demo_model, keyword, value) -> None:
    with pytest.raises(ArError, match=f"{keyword} {value} is not allowed"):
        AutoRound(demo_model, **{keyword: value})


def test_a_device_that_is_not_there_is_refused(demo_model, tmp_path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ArError, match="device 'cuda' cannot be used here"):
        AutoRound(demo_model, device_map="cuda").quantize_and_save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_quantized_already_is_refused(demo_model, tmp_path) -> None:
    config = json.loads((demo_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "auto-round", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArError, match="already quantized"):
        AutoRound(tmp_path)


def test_a_source_with_pickles_only_is_refused(demo_model, tmp_path) -> None:
    (tmp_path / "config.json").write_text((demo_model / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ArError, match="Only pickles are there"):
        AutoRound(tmp_path)


def test_seqlen_beyond_the_positions_of_the_model_is_refused(demo_model, tmp_path) -> None:
    job = AutoRound(demo_model, seqlen=10**6, iters=1)
    with pytest.raises(ArError, match="seqlen 1000000 is more than the model's"):
        job.quantize_and_save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
