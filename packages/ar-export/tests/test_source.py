from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ar_export import ExportError
from ar_export.sink import ar_open_source
from ar_export.source import open_source
from ar_kernels import data_type
from ar_schemes import scheme


def config_of(path):
    return json.loads((path / "config.json").read_text())


def edit_config(path, change) -> None:
    document = config_of(path)
    change(document)
    (path / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize("name", ["W4A16", "W8A16"])
def test_a_packed_checkpoint_gives_floats_under_float_names(make, name) -> None:
    path, weights = make(name)
    source = open_source(path)
    assert set(source.names) == {
        *(f"{layer}.weight" for layer in weights),
        *("model.norm.weight", "model.layers.0.q_proj.bias"),
    }
    assert source.dequantized == {f"{layer}.weight" for layer in weights}
    got = dict(source.read(source.names))
    for layer, weight in weights.items():
        dense = got[f"{layer}.weight"]
        assert torch.equal(dense, weight.dequantize(torch.bfloat16))
        assert source.shape(f"{layer}.weight") == tuple(dense.shape)
    assert source.shape("model.norm.weight") == (64,)
    assert got["model.layers.0.q_proj.bias"].dtype is torch.float32


def test_the_type_of_the_floats_is_the_configured_one_or_that_of_the_rest(make) -> None:
    path, _ = make()
    assert open_source(path).dtype is torch.bfloat16
    edit_config(path, lambda c: c.pop("dtype"))
    tensors = load_file(path / "model.safetensors")
    tensors = {
        k: v.half() if k.endswith(("norm.weight", "bias")) else v for k, v in tensors.items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert open_source(path).dtype is torch.float16
    edit_config(path, lambda c: c.update(text_config={"torch_dtype": "float32"}))
    assert open_source(path).dtype is torch.float32


def test_what_is_not_ours_is_left_to_others(make, tmp_path) -> None:
    assert ar_open_source(tmp_path, {}) is None
    assert ar_open_source(tmp_path, {"quantization_config": "text"}) is None
    assert ar_open_source(tmp_path, {"quantization_config": {"quant_method": "mystery"}}) is None
    path, _ = make()
    assert ar_open_source(path, config_of(path)).names == open_source(path).names


def test_a_checkpoint_that_is_not_quantized_is_refused(make) -> None:
    path, _ = make()
    edit_config(path, lambda c: c.update(quantization_config={"quant_method": "mystery"}))
    with pytest.raises(ExportError, match="no installed format reads quant_method 'mystery'"):
        open_source(path)
    (path / "quantization_config.json").unlink()
    edit_config(path, lambda c: c.pop("quantization_config"))
    with pytest.raises(ExportError, match="is not quantized"):
        open_source(path)


def test_a_config_without_a_quantized_layer_is_refused(make) -> None:
    path, _ = make()
    save_file({"x.weight": torch.ones(2, 2)}, path / "model.safetensors")
    with pytest.raises(ExportError, match="no layer is quantized"):
        open_source(path)


def fp8(rows: int, columns: int, tile: int):
    """Return (codes, scales, floats) of a matrix in FP8 tiles, the last ones cut."""
    generator = torch.Generator().manual_seed(1)
    count = (-(-rows // tile), -(-columns // tile))
    codes = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(count, generator=generator) + 0.5
    floats = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            floats[i, j] = codes[i, j].float() * scales[i // tile, j // tile]
    return codes, scales, floats


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
CT = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                **{"num_bits": 8, "type": "float", "symmetric": True},
                **{"strategy": "block", "block_structure": [16, 16]},
            },
        }
    },
}


@pytest.mark.parametrize(
    ("suffix", "quantization"),
    [("weight_scale_inv", {**FP8, "weight_block_size": [16, 16]}), ("weight_scale", CT)],
    ids=["fp8", "compressed-tensors"],
)
@pytest.mark.parametrize("shape", [(40, 32), (32, 24), (8, 8), (32, 32)], ids=str)
def test_tiles_that_hang_over_the_edge_are_read(tmp_path, suffix, quantization, shape) -> None:
    codes, scales, floats = fp8(*shape, 16)
    tensors = {"a.weight": codes, f"a.{suffix}": scales, "norm.weight": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "x", "dtype": "float32", "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(tmp_path)
    assert set(source.names) == {"a.weight", "norm.weight"}
    assert source.shape("a.weight") == shape
    assert torch.equal(dict(source.read(["a.weight"]))["a.weight"], floats)


def test_scales_that_fit_no_tiling_are_refused(tmp_path) -> None:
    codes, _, _ = fp8(40, 32, 16)
    tensors = {"a.weight": codes, "a.weight_scale_inv": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "x", "quantization_config": {**FP8, "weight_block_size": [16, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="does not divide"):
        open_source(tmp_path)


def test_tiles_are_what_the_arithmetic_says(tmp_path) -> None:
    spec = scheme("FP8_BLOCK").weight
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    kind = data_type(spec.data_type)
    made = kind.quantize(weight, spec, kind.parameters(weight, spec))
    tensors = {
        "a.weight": made.codes.view(torch.float8_e4m3fn),
        "a.weight_scale_inv": made.scale,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    quantization = {**FP8, "weight_block_size": [128, 128]}
    config = {"model_type": "x", "dtype": "float32", "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = dict(open_source(tmp_path).read(["a.weight"]))["a.weight"]
    assert torch.equal(got, made.dequantize())
