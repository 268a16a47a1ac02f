"""What a plan takes is told to the byte before a weight exists."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors import safe_open

from ar_export import ExportError, formats
from ar_export.formats.fake import FakeFormat
from ar_export.measure import plan_size
from ar_export.sink import ar_measure_plan, ar_open_sink
from ar_export.testing.model import (
    CONFIG,
    ExampleRequest,
    example_plan,
    example_weights,
    float_tensors,
)
from ar_schemes import LayerInfo, LayerRules, make_plan, scheme

CASES = [
    ("auto_round", "W4A16", None),
    ("auto_round", "W2A16G64", "W8A16"),
    ("auto_round", "MXFP4", None),
    ("auto_round", "NVFP4", None),
    ("auto_round", "FP8_STATIC", None),
    ("auto_round:auto_awq", "W4A16", None),
    ("auto_gptq", "W4A16", "W2A16"),
    ("llm_compressor", "W4A16", None),
    ("llm_compressor", "NVFP4", None),
    ("fp8", "FP8_BLOCK", None),
]


def facts(tensors) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        key: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in tensors.items()
    }


@pytest.mark.parametrize(("format", "preset", "other"), CASES, ids=lambda v: str(v))
def test_layers_are_priced_to_the_byte_and_files_within_a_hundredth(
    format, preset, other, tmp_path
) -> None:
    plan = example_plan(preset, down_proj=other)
    request = ExampleRequest(tmp_path / "out", plan, format)
    plan = adjusted(format, plan)
    floats = float_tensors(plan)
    told = ar_measure_plan(format, plan, dict(CONFIG), facts(floats))
    assert told is not None
    assert not told.refused
    sink = ar_open_sink(ExampleRequest(request.output, plan, format))
    for name, weight in example_weights(plan).items():
        sink.put(name, weight)
    for name, tensor in floats.items():
        sink.put_tensor(name, tensor)
    path = sink.commit()
    (file,) = path.glob("*.safetensors")
    with safe_open(file, framework="pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    for row in plan.quantized:
        mine = [t for k, t in tensors.items() if k.startswith(f"{row.layer.name}.")]
        biases = [t for k, t in floats.items() if k.startswith(f"{row.layer.name}.")]
        size = sum(t.numel() * t.element_size() for t in mine)
        size -= sum(t.numel() * t.element_size() for t in biases)
        assert told.layers[row.layer.name] == size, row.layer.name
    size = file.stat().st_size
    assert size <= told.total <= size * 1.005 + 500


def adjusted(format, plan):
    from ar_export.sink import ar_adjust_plan

    return ar_adjust_plan(format, plan, dict(CONFIG)) or plan


class Plain(FakeFormat):
    """A format of floats that says it is one of its own."""

    def config(self, request):
        return {"quant_method": "plain"}


def test_a_format_that_writes_floats_has_no_sizes() -> None:
    assert ar_measure_plan("fake", example_plan("W4A16"), dict(CONFIG), {}) is None


def test_many_rows_are_priced_from_few(monkeypatch) -> None:
    block = "model.layers.0"
    shapes = [(5000 * 32, 256), (128 * 999, 512), (64, 256)]
    layers = [LayerInfo(f"{block}.l{i}", r, c, block) for i, (r, c) in enumerate(shapes)]
    plan = make_plan(layers, LayerRules(scheme("W4A16")))
    packed = []
    inner = Plain.tensors

    def watched(self, config, weight, dtype):
        packed.append(weight.shape[0])
        return inner(self, config, weight, dtype)

    monkeypatch.setattr(Plain, "tensors", watched)
    found = plan_size(Plain(), "fake", plan, dict(CONFIG), {})
    assert max(packed) <= 384
    assert [found.layers[la.name] for la in layers] == [math.prod(s) * 2 for s in shapes]


def test_a_layer_is_packed_once_per_scheme_and_shape(monkeypatch) -> None:
    count = []
    inner = Plain.tensors
    monkeypatch.setattr(Plain, "tensors", lambda self, *args: count.append(1) or inner(self, *args))
    plan_size(Plain(), "fake", example_plan("W4A16"), dict(CONFIG), {})
    assert len(count) == 2  # attention, down_proj


def test_what_a_format_refuses_is_told_and_not_counted() -> None:
    plan = example_plan("W4A16", down_proj="MXFP4")
    found = ar_measure_plan("auto_gptq", plan, dict(CONFIG), {})
    assert found is not None
    assert "no quantized activations" in found.refused["model.layers.0.mlp.down_proj"]
    assert "model.layers.0.mlp.down_proj" not in found.layers
    rules = LayerRules(scheme("W4A16"), layer_config={"model.embed_tokens": "W4A16"})
    embedded = make_plan([r.layer for r in plan.rows], rules)
    found = ar_measure_plan("auto_round", embedded, dict(CONFIG), {})
    assert found is not None
    assert "cannot hold a quantized embedding" in found.refused["model.embed_tokens"]


def test_a_plan_that_cannot_be_written_at_all_is_an_error() -> None:
    with pytest.raises(ExportError, match="one packing per checkpoint"):
        ar_measure_plan("auto_round", example_plan("W4A16", down_proj="MXFP4"), dict(CONFIG), {})


def test_a_format_of_others_is_left_to_them() -> None:
    assert ar_measure_plan("theirs", example_plan("W4A16"), dict(CONFIG), {}) is None


def test_nothing_quantized_is_floats_alone() -> None:
    plan = example_plan("BF16")
    found = ar_measure_plan("auto_round", plan, dict(CONFIG), {"x": ((3, 5), "float32")})
    assert found is not None
    assert found.layers == {}
    assert 60 < found.total < 220


@pytest.mark.parametrize("preset", ["GGUF:Q4_K_S", "GGUF:Q2_K_S", "GGUF:Q8_0"])
def test_gguf_is_priced_by_its_blocks(preset) -> None:
    pytest.importorskip("gguf")
    plan = example_plan(preset)
    weights = example_weights(plan)
    floats = {"model.norm.weight": torch.ones(256, dtype=torch.bfloat16)}
    found = ar_measure_plan("gguf", plan, dict(CONFIG), facts(floats))
    assert found is not None
    kind = formats()["gguf"]
    for name, weight in weights.items():
        (blocks,) = kind.tensors(None, weight, torch.bfloat16).values()
        assert found.layers[name] == blocks.numel()
    bare = ar_measure_plan("gguf", plan, dict(CONFIG), {})
    assert bare is not None
    assert found.rest - bare.rest == 256 * 4  # norms are float32 there
