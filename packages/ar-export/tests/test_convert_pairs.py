"""Every ordered pair of formats: the very same weights, or a refusal that says why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from ar_export import ExportError, convert, open_checkpoint, verify
from ar_export import format as find_format
from ar_export.sink import ar_open_sink
from ar_export.testing import LAYERS, ExampleRequest, example_weights, float_tensors, write_model
from ar_schemes import LayerRules, make_plan, scheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("gguf")

SYM, ASYM, EIGHT = "int4", "int4 asym", "int8"
TARGETS = (
    *("auto_round", "auto_round:gptqmodel", "auto_gptq", "auto_gptq:gptq_v2", "auto_awq"),
    *("llm_compressor", "mlx", "gguf:q4_0", "gguf:q4_1", "gguf:q8_0"),
)
SOURCES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    form: {
        SYM: ("W4A16G32", {}),
        ASYM: ("W4A16G32", {"sym": False}),
        EIGHT: ("W8A16G32", {}),
    }
    for form in TARGETS
    if "gguf" not in form and form != "auto_awq"
}
SOURCES["auto_awq"] = {k: v for k, v in SOURCES["auto_round"].items() if k != EIGHT}
SOURCES["gguf:q4_0"] = {SYM: ("GGUF:Q4_0", {})}
SOURCES["gguf:q4_1"] = {ASYM: ("GGUF:Q4_1", {})}
SOURCES["gguf:q8_0"] = {EIGHT: ("GGUF:Q8_0", {})}

MINIMUM = ("mlx", "gguf:q4_1")
"""Formats whose asymmetric weights have a float minimum instead of an integer zero point."""
NO_ZERO = "int_asym_float_zp"
NO_NUMBER = (
    "scale . zero point is no (b?float16|float32) number, which (gguf|mlx) would have to store"
)


def refusal(source: str, target: str, kind: str) -> str | None:
    """Return the reason against a conversion as a pattern, None where it must be exact."""
    if target == "auto_awq" and kind == EIGHT:
        return "awq holds int of 4 bits, not int8"
    if kind != ASYM or target == source:
        return None
    if source in MINIMUM:
        return None if target.startswith(("mlx", "gguf")) else NO_ZERO
    return NO_NUMBER if target.startswith(("mlx", "gguf")) else None


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a function that gives a checkpoint of a format and a kind of integer, made once."""
    folder = tmp_path_factory.mktemp("sources")
    model = write_model(folder / "float")
    tokenizer(model)
    kept: dict[tuple[str, str], Path] = {}

    def get(form: str, kind: str) -> Path:
        if (form, kind) not in kept:
            name, changes = SOURCES[form][kind]
            ignored = ("gate_proj", "up_proj", "lm_head")
            base = scheme(name).with_overrides(changes)
            plan = make_plan(LAYERS, LayerRules(base, ignore_layers=ignored))
            adjust = getattr(find_format(form), "adjust", None)
            if adjust is not None and "gguf" not in form:  # whose mix has further types
                plan = adjust(form, plan, {"dtype": "bfloat16"})
            output = folder / f"{form}-{kind}".replace(":", "-")
            sink = ar_open_sink(ExampleRequest(output, plan, form, model))
            assert sink is not None
            for layer, weight in example_weights(plan).items():
                sink.put(layer, weight)
            for key, tensor in float_tensors(plan).items():
                sink.put_tensor(key, tensor)
            kept[form, kind] = sink.commit()
        return kept[form, kind]

    return get


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("source", "kind"), [(f, k) for f, kinds in SOURCES.items() for k in kinds]
)
def test_a_conversion_is_exact_or_refused_with_the_reason(
    made, tmp_path, source, kind, target
) -> None:
    first, output = made(source, kind), tmp_path / "out"
    why = refusal(source, target, kind)
    if why is not None:
        with pytest.raises(ExportError, match=why):
            convert(first, output, target)
        assert not output.exists()
        return
    path = convert(first, output, target)
    a, b = open_checkpoint(first), open_checkpoint(path)
    assert b.format == find_format(target).name
    assert a.quantized.keys() == b.quantized.keys()
    for name in a.quantized:
        old, new = a.weight(name), b.weight(name)
        assert torch.equal(old.dequantize(), new.dequantize()), name
        assert torch.equal(old.codes, new.codes), name
    for name in ("model.embed_tokens", "model.layers.0.mlp.up_proj", "model.norm"):
        assert torch.equal(a.tensor(f"{name}.weight").float(), b.tensor(f"{name}.weight").float())
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(a.tensor(bias).float(), b.tensor(bias).float())
    report = verify(path)
    assert report.ok, report.findings
    again = open_checkpoint(convert(path, tmp_path / "back", source))
    for name in a.quantized:
        assert torch.equal(again.weight(name).dequantize(), a.weight(name).dequantize()), name


def test_scales_that_the_target_cannot_hold_are_refused(made, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    first = convert(made("llm_compressor", SYM), tmp_path / "ct", "llm_compressor")
    tensors = load_file(first / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight_scale"
    assert tensors[key].dtype == torch.bfloat16
    tensors[key] = torch.full_like(tensors[key], 1e-9)
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="scales are no float16 numbers, which auto_gptq would"):
        convert(first, tmp_path / "out", "auto_gptq")
