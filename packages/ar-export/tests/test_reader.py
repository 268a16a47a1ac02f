from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ar_export import ExportError, format, formats, open_checkpoint, verify


def edit(path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_tensors(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def errors(path) -> str:
    report = verify(path)
    assert not report.ok
    return "\n".join(f.what for f in report.findings)


def test_a_missing_directory_is_named(tmp_path) -> None:
    with pytest.raises(ExportError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "nothing")


def test_a_directory_without_a_config_is_named(tmp_path) -> None:
    with pytest.raises(ExportError, match=r"no config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"], ids=["torn", "list"])
def test_a_config_that_is_no_object_is_named(make, text) -> None:
    path, _ = make()
    (path / "config.json").write_text(text)
    with pytest.raises(ExportError, match="JSON"):
        open_checkpoint(path)


def test_a_truncated_shard_is_named(make) -> None:
    path, _ = make()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ExportError, match="not a whole safetensors file"):
        open_checkpoint(path)
    assert "not a whole" in errors(path)


def test_weights_only_as_pickle_are_not_read(make) -> None:
    path, _ = make()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ExportError, match="Only pickles are there"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["../evil.safetensors", "a\\b", ".."])
def test_an_index_that_points_elsewhere_is_refused(make, name) -> None:
    path, _ = make(max_shard_bytes=3000)
    index = path / "model.safetensors.index.json"
    edit(index, lambda d: d["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(ExportError, match="not a file beside it"):
        open_checkpoint(path)


def test_an_index_that_names_a_missing_file_is_refused(make) -> None:
    path, _ = make(max_shard_bytes=3000)
    next(iter(path.glob("model-00001-*.safetensors"))).unlink()
    with pytest.raises(ExportError, match="is missing"):
        open_checkpoint(path)


def test_an_index_that_differs_from_the_files_is_refused(make) -> None:
    path, _ = make(max_shard_bytes=3000)
    index = path / "model.safetensors.index.json"
    edit(index, lambda d: d["weight_map"].pop("model.norm.weight"))
    with pytest.raises(ExportError, match="differ on 1 tensors"):
        open_checkpoint(path)
    edit(index, lambda d: d.pop("weight_map"))
    with pytest.raises(ExportError, match="weight_map is missing"):
        open_checkpoint(path)


def test_a_method_that_is_not_known_is_named(make) -> None:
    path, _ = make()
    edit(path / "config.json", lambda d: d["quantization_config"].update(quant_method="mystery"))
    with pytest.raises(ExportError, match="'mystery'"):
        open_checkpoint(path)
    edit(path / "config.json", lambda d: d.update(quantization_config="x"))
    with pytest.raises(ExportError, match="must be an object"):
        open_checkpoint(path)


def test_a_scheme_that_cannot_be_is_named(make) -> None:
    path, _ = make()
    edit(path / "config.json", lambda d: d["quantization_config"].update(group_size=-9))
    with pytest.raises(ExportError, match="group size -9"):
        open_checkpoint(path)


def test_packed_tensors_of_a_layer_that_is_not_quantized_are_refused(make) -> None:
    path, _ = make()
    extra = {"model.layers.0.q_proj": {"bits": 16, "data_type": "fp"}}
    edit(path / "config.json", lambda d: d["quantization_config"].update(extra_config=extra))
    with pytest.raises(ExportError, match="the config says it is not quantized"):
        open_checkpoint(path)


def test_a_missing_scale_is_named(make) -> None:
    path, _ = make()
    edit_tensors(path, lambda t: t.pop("model.layers.0.q_proj.scales"))
    with pytest.raises(ExportError, match="scales is missing"):
        open_checkpoint(path)


def test_a_missing_zero_point_is_found(make) -> None:
    path, _ = make()
    edit_tensors(path, lambda t: t.pop("model.layers.0.q_proj.qzeros"))
    assert "no tensor model.layers.0.q_proj.qzeros" in errors(path)


def test_a_tensor_of_the_wrong_type_is_found(make) -> None:
    path, _ = make()
    key = "model.layers.0.q_proj.scales"
    edit_tensors(path, lambda t: t.update({key: t[key].float()}))
    assert "holds scales in float16, not float32" in errors(path)


def test_scales_that_are_not_finite_are_found(make) -> None:
    path, _ = make()
    key = "model.layers.0.q_proj.scales"
    edit_tensors(path, lambda t: t.update({key: torch.full_like(t[key], float("nan"))}))
    assert "NaN" in errors(path)


def test_zero_points_that_contradict_symmetry_are_found(make) -> None:
    path, _ = make()
    key = "model.layers.0.q_proj.qzeros"
    edit_tensors(path, lambda t: t.update({key: torch.zeros_like(t[key])}))
    assert "symmetric" in errors(path)


def test_changed_bits_are_found(make) -> None:
    path, weights = make()
    key = "model.layers.0.q_proj.qweight"
    edit_tensors(path, lambda t: t.update({key: t[key] ^ 1}))
    report = verify(path, expected=weights)
    assert [f.where for f in report.findings] == ["model.layers.0.q_proj"]
    assert "not those that were tuned" in report.findings[0].what


def test_stray_and_double_tensors_are_found(make) -> None:
    path, _ = make()
    edit_tensors(path, lambda t: t.update({"model.layers.0.q_proj.g_idx": torch.zeros(3)}))
    assert not verify(path).ok
    path, _ = make(folder="b")
    edit_tensors(path, lambda t: t.update({"model.layers.0.q_proj.weight": torch.zeros(3)}))
    assert "both packed and float" in errors(path)


def test_configs_that_differ_are_found(make) -> None:
    path, _ = make()
    edit(path / "quantization_config.json", lambda d: d.update(bits=3))
    assert "differs from the one in config.json" in errors(path)


def test_a_quantized_layer_or_tensor_that_is_not_there_is_an_error(make) -> None:
    found = open_checkpoint(make()[0])
    with pytest.raises(ExportError, match="no quantized layer nothing"):
        found.weight("nothing")
    with pytest.raises(ExportError, match="no tensor nothing"):
        found.tensor("nothing")


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(ExportError, match="Did you mean auto_round"):
        format("auto_ruond")
    assert {"auto_round", "auto_gptq", "auto_awq", "llm_compressor", "fp8", "fake"} <= set(
        formats()
    )


def test_unlike_schemes_in_a_fused_layer_are_a_warning(make) -> None:
    path, _ = make()
    edit_tensors(path, lambda t: t.update({"model.layers.0.k_proj.weight": torch.zeros(32, 128)}))
    report = verify(path)
    assert report.ok
    assert {f.level for f in report.findings} == {"warning"}
    assert "fuse" in report.findings[0].what
