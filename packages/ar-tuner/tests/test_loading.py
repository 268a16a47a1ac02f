from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from ar_tuner import AutoRound, TunerError
from ar_tuner.evaluate import compare, perplexity, windows
from ar_tuner.loading import check_source, checked_device, load_meta, load_model, load_tokenizer
from ar_tuner.names import map_names, source_files, source_tensors


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "model"
    model("llama").save_pretrained(path)
    return path


def test_a_directory_gives_its_model_with_and_without_weights(saved) -> None:
    loaded, tokenizer = load_model(saved, dtype="bfloat16", trust_remote_code=False)
    assert loaded.dtype is torch.bfloat16
    assert tokenizer is None
    assert load_tokenizer(saved) is None
    meta = load_meta(saved, trust_remote_code=False)
    assert all(p.is_meta for p in meta.parameters())
    assert set(dict(meta.named_parameters())) == set(dict(loaded.named_parameters()))


def test_a_checkpoint_that_lacks_tensors_is_refused(saved) -> None:
    file = saved / "model.safetensors"
    tensors = dict(source_tensors(source_files(saved), source_files(saved)))
    tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(TunerError, match=r"lacks 1 tensors .*model\.norm\.weight"):
        load_model(saved, dtype="auto", trust_remote_code=False)


def test_what_is_no_float_checkpoint_is_named(saved, tmp_path) -> None:
    assert check_source(saved, allow_download=False) == saved
    with pytest.raises(TunerError, match="does not exist. To fetch it"):
        check_source(tmp_path.__class__("owner/name"), allow_download=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(TunerError, match="is a file"):
        check_source(tmp_path / "file", allow_download=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(TunerError, match=r"no config\.json"):
        check_source(empty, allow_download=False)
    for text, message in (("{", "is not JSON"), ("[]", "must hold a JSON object")):
        (empty / "config.json").write_text(text)
        with pytest.raises(TunerError, match=message):
            check_source(empty, allow_download=False)
    (empty / "config.json").write_text("{}")
    with pytest.raises(TunerError, match="has no model.safetensors"):
        check_source(empty, allow_download=False)
    (empty / "x.bin").write_text("")
    with pytest.raises(TunerError, match=r"Only pickles are there \(x\.bin\)"):
        check_source(empty, allow_download=False)
    quantized = {"quantization_config": {"quant_method": "awq"}}
    (empty / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(TunerError, match="already quantized"):
        check_source(empty, allow_download=False)


def test_a_type_or_device_that_is_not_there_is_refused(saved) -> None:
    with pytest.raises(TunerError, match="dtype 'int8' is not allowed"):
        load_model(saved, dtype="int8", trust_remote_code=False)
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(TunerError, match=f"device '{name}' cannot be used here"):
            checked_device(name)
    assert checked_device("cpu").type == "cpu"


def test_files_of_tensors_are_found_and_path_tricks_refused(tmp_path) -> None:
    with pytest.raises(TunerError, match="pickles are not read"):
        source_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../x.safetensors", "missing.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(TunerError, match="not a file beside it"):
            source_files(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    files = source_files(tmp_path)
    assert [k for k, _ in source_tensors(files, ["a"])] == ["a"]


def test_names_are_matched_by_their_ends() -> None:
    source = ["model.layers.0.mlp.up.weight", "language_model.model.norm.weight"]
    found = map_names(["layers.0.mlp.up.weight", "model.norm.weight", "lm_head.weight"], source)
    assert found == {"layers.0.mlp.up.weight": source[0], "model.norm.weight": source[1]}


def test_a_model_is_the_same_as_itself(model, rows) -> None:
    made = model("llama")
    scores = compare(made, made, rows, batch=3)
    assert scores.kl == pytest.approx(0, abs=1e-6)
    assert scores.top1 == 1
    assert scores.tokens == 8 * 31
    assert scores.ppl == pytest.approx(perplexity(made, rows, batch=5))
    with torch.no_grad():
        loss = made(input_ids=rows, labels=rows).loss
    assert math.log(scores.ppl) == pytest.approx(float(loss), rel=1e-4)


def test_a_changed_model_is_told_from_its_reference(model, rows) -> None:
    made, other = model("llama"), model("llama")
    other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight))
    scores = compare(made, other, rows)
    assert scores.kl > 0.01
    assert scores.top1 < 1


def test_windows_do_not_overlap_and_leave_the_rest() -> None:
    class Letters:
        def __call__(self, text, **_):
            ids = torch.tensor([[ord(c) for c in text]])
            return type("Encoded", (), {"input_ids": ids})()

    assert windows(Letters(), "abcdefgh", seqlen=3).tolist() == [[97, 98, 99], [100, 101, 102]]
    assert windows(Letters(), "abcdefgh", seqlen=3, tokens=5).shape == (1, 3)
    with pytest.raises(TunerError, match="less than one window of 9"):
        windows(Letters(), "abcdefgh", seqlen=9)


def test_layers_that_are_several_tensors_in_the_checkpoint_stay_and_say_why(tmp_path) -> None:
    from ar_tuner.testing import tiny_model

    tiny_model("minimax_m3_vl").save_pretrained(tmp_path)
    plan = AutoRound(tmp_path, group_size=32).plan()
    row = plan["model.language_model.layers.0.mlp.shared_experts.gate_up_proj"]
    assert not row.quantized
    assert "joined of 2 tensors of the checkpoint" in row.reason
    assert plan["model.language_model.layers.0.mlp.shared_experts.down_proj"].quantized
