"""What vLLM and SGLang would stumble over is said; what we write gives no cause."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ar_export import ExportError, format, lint, open_checkpoint
from ar_export.reader import Checkpoint
from ar_export.sink import ar_open_sink, check_plan
from ar_export.testing import ExampleRequest
from ar_kernels import data_type
from ar_kernels.hf.compressed import LAYOUTS
from ar_schemes import LayerInfo, LayerRules, make_plan, scheme, schemes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCK = "model.layers.0"
WIDE = 128
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def rows_of(*names: str, experts: int = 0) -> list[LayerInfo]:
    out = [LayerInfo(f"{BLOCK}.{n}", WIDE, WIDE, BLOCK) for n in (*names, "mlp.down_proj")]
    for i in range(experts):
        for tail in ("gate_proj", "up_proj", "down_proj"):
            name = f"{BLOCK}.mlp.experts.{i}.{tail}"
            out.append(LayerInfo(name, WIDE, WIDE, BLOCK, role="experts"))
    return [*out, LayerInfo("lm_head", WIDE, WIDE, None, role="lm_head")]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint of one block and a head."""

    def make(form: str, name: str, *, experts: int = 0, **rules: Any) -> Path:
        size = rules.pop("overrides", {"group_size": 32} if "A16" in name[:5] else {})
        layers = rows_of(*FUSED, experts=experts)
        plan = make_plan(layers, LayerRules(scheme(name).with_overrides(size), **rules))
        adjust = getattr(format(form), "adjust", None)
        plan = plan if adjust is None else adjust(form, plan, CONFIG)
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        sink = ar_open_sink(ExampleRequest(output, plan, form, None, CONFIG))
        assert sink is not None
        generator = torch.Generator().manual_seed(0)
        for row in plan.rows:
            floats = torch.randn(row.layer.rows, row.layer.columns, generator=generator)
            spec = row.scheme.weight
            if spec is None:
                sink.put_tensor(f"{row.layer.name}.weight", floats.bfloat16())
                continue
            kind = data_type(spec.data_type)
            shared = (
                {"global_scale": torch.tensor([[100.0]])} if spec.data_type == "nv_fp" else None
            )
            sink.put(
                row.layer.name,
                kind.quantize(floats, spec, kind.parameters(floats, spec, shared=shared)),
            )
        return sink.commit()

    return make


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the quantization config, in both of its files."""
    whole = json.loads((path / "config.json").read_text())
    change(whole["quantization_config"])
    (path / "config.json").write_text(json.dumps(whole))
    (path / "quantization_config.json").write_text(json.dumps(whole["quantization_config"]))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def warnings(path: Path) -> str:
    found = [f for f in lint(open_checkpoint(path)) if f.level == "warning"]
    return "\n".join(f"{f.where}: {f.what}" for f in found)


WRITTEN = [
    ("auto_round", "W4A16", {}),
    ("auto_round", "W4A16", {"overrides": {"sym": False, "group_size": 32}}),
    ("auto_round", "W4A16", {"quant_lm_head": True}),
    ("auto_round", "W4A16", {"layer_config": {"mlp.down_proj": {"bits": 8}}}),
    ("auto_round", "W4A16", {"ignore_layers": ("gate_proj", "up_proj")}),
    ("auto_round", "W4A16", {"experts": 2, "layer_config": {"experts": {"bits": 8}}}),
    ("auto_round", "W4A16", {"experts": 2, "ignore_layers": ("experts",)}),
    ("auto_gptq", "W4A16", {"experts": 2, "layer_config": {"experts": {"bits": 8}}}),
    ("auto_gptq", "W4A16", {"experts": 2, "ignore_layers": ("experts",)}),
    ("auto_awq", "W4A16", {"experts": 2, "ignore_layers": ("experts",)}),
    ("llm_compressor", "W4A16", {"experts": 2, "ignore_layers": ("experts",)}),
    ("auto_round", "MXFP8", {}),
    ("auto_round", "FP8_BLOCK", {"ignore_layers": ("mlp.down_proj",)}),
    ("auto_gptq", "W4A16", {"quant_lm_head": True}),
    ("auto_gptq", "W4A16", {"layer_config": {"self_attn": {"bits": 8}}}),
    ("auto_gptq", "W4A16", {"overrides": {"sym": False, "group_size": 32}}),
    ("auto_awq", "W4A16", {"ignore_layers": ("self_attn",)}),
    ("llm_compressor", "W4A16", {"quant_lm_head": True}),
    ("llm_compressor", "W4A16", {"layer_config": {"self_attn": {"bits": 8}}}),
    ("llm_compressor", "NVFP4", {"layer_config": {"self_attn": "FP8_STATIC"}}),
    ("llm_compressor", "INT4", {}),
    ("fp8", "FP8_BLOCK", {"ignore_layers": ("self_attn",)}),
]


@pytest.mark.parametrize(
    ("form", "name", "rules"),
    WRITTEN,
    ids=[f"{f}-{n}-{'-'.join(r) or 'plain'}" for f, n, r in WRITTEN],
)
def test_what_we_write_gives_no_cause(write, form, name, rules) -> None:
    assert warnings(write(form, name, **rules)) == ""


Q, K, DOWN = (f"{BLOCK}.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))


TAILS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def group(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]


BROKEN: list[tuple[str, str, Callable[[dict[str, Any]], object], str]] = [
    ("auto_round", "W4A16", lambda c: c.pop("packing_format"), "packing_format missing"),
    ("auto_round", "W4A16", lambda c: c.update(act_bits=16), "act_bits with activations in 16 bit"),
    ("auto_round", "MXFP8", lambda c: c.pop("act_group_size"), "act_group_size missing"),
    ("auto_round", "MXFP8", lambda c: c.update(act_dynamic=False), "vLLM asserts True"),
    ("auto_round", "FP8_BLOCK", lambda c: c.pop("fmt"), "fmt missing"),
    (
        "auto_round",
        "FP8_BLOCK",
        lambda c: c.update(activation_scheme="static"),
        "asserts 'dynamic'",
    ),
    (
        "auto_round",
        "W4A16",
        lambda c: c.update(extra_config={"layers.*q_proj$": {"bits": 4}}),
        "without .* before it",
    ),
    (
        "auto_round",
        "W4A16",
        lambda c: c.update(block_name_to_quantize="model.layers,lm"),
        "begins like",
    ),
    ("auto_gptq", "W4A16", lambda c: c.pop("desc_act"), "desc_act missing"),
    ("auto_gptq", "W4A16", lambda c: c.update(desc_act=True), "desc_act is true"),
    ("auto_gptq", "W4A16", lambda c: c.update(meta={}), "meta makes"),
    ("auto_gptq", "W4A16", lambda c: c.update(dataset="mine"), "dataset 'mine'"),
    ("auto_gptq", "W4A16", lambda c: c.update(modules_in_block_to_quantize=TAILS), "optimum"),
    ("auto_gptq", "W4A16", lambda c: c.update(lm_head=True), "the head is not quantized"),
    (
        "auto_gptq",
        "W4A16",
        lambda c: c.update(dynamic={"+:model.*q_proj": {"bits": 4}}),
        "begin it",
    ),
    ("auto_gptq", "W4A16", lambda c: c.update(dynamic={"+:.*q_proj": {"bits": 4}}), "not mean qkv"),
    ("auto_awq", "W4A16", lambda c: c.pop("zero_point"), "zero_point missing"),
    (
        "auto_awq",
        "W4A16",
        lambda c: c["modules_to_not_convert"].append("mlp.gate"),
        "part of the name",
    ),
    ("auto_awq", "W4A16", lambda c: c.update(modules_to_not_convert=[], lm_head=True), "lm_head"),
    ("llm_compressor", "W4A16", lambda c: c.pop("quantization_status"), "not compressed"),
    ("llm_compressor", "W4A16", lambda c: c["ignore"].remove("lm_head"), "ignore does not say so"),
    (
        "llm_compressor",
        "W4A16",
        lambda c: c.update(sparsity_config={"targets": ["Linear"]}),
        "sparsity",
    ),
    ("llm_compressor", "W4A16", lambda c: group(c)["weights"].update(order=1), "order unknown"),
    ("llm_compressor", "W4A16", lambda c: group(c)["weights"].update(actorder="group"), "actorder"),
    ("llm_compressor", "INT8", lambda c: group(c)["weights"].update(group_size=32), "contradicts"),
    (
        "llm_compressor",
        "INT8",
        lambda c: group(c)["input_activations"].update(dynamic=False),
        "token needs dynamic",
    ),
    (
        "llm_compressor",
        "FP8_STATIC",
        lambda c: group(c)["input_activations"].update(dynamic="local"),
        "local needs strategy tensor_group",
    ),
    ("llm_compressor", "MXFP8", lambda c: group(c)["weights"].pop("scale_dtype"), "scale_dtype"),
    ("llm_compressor", "W4A16", lambda c: c["config_groups"].update(g=group(c)), "2 groups target"),
    ("fp8", "FP8_BLOCK", lambda c: c.pop("activation_scheme"), "activation_scheme missing"),
    ("fp8", "FP8_BLOCK", lambda c: c.update(activation_scheme="static"), "needs activation_scheme"),
    ("fp8", "FP8_BLOCK", lambda c: c.update(modules_to_not_convert=[]), "does not say so"),
]


@pytest.mark.parametrize(
    ("form", "name", "change", "says"), BROKEN, ids=[f"{b[0]}-{b[3]}" for b in BROKEN]
)
def test_a_config_that_engines_refuse_is_found(write, form, name, change, says) -> None:
    path = write(form, name)
    assert warnings(path) == ""
    edit(path, change)
    assert says in warnings(path)


def test_asymmetric_weights_as_gptq_version_1_are_found(write) -> None:
    path = write("auto_gptq", "W4A16", overrides={"sym": False, "group_size": 32})
    edit(path, lambda c: c.update(checkpoint_format="gptq"))
    assert "asymmetric weights as version 1" in warnings(path)


def test_a_quantized_head_is_declared_in_full(write) -> None:
    path = write("auto_round", "W4A16", quant_lm_head=True)
    edit(path, lambda c: c["extra_config"]["lm_head"].pop("sym"))
    assert "lm_head: lies outside the blocks; extra_config must give its sym" in warnings(path)
    path = write("llm_compressor", "W4A16", quant_lm_head=True)
    edit(path, lambda c: group(c)["targets"].remove("lm_head"))
    assert "lm_head: is quantized and needs a target" in warnings(path)


@pytest.mark.parametrize("form", ["auto_round", "auto_gptq", "llm_compressor"])
def test_unlike_members_of_a_fused_layer_are_found(write, form) -> None:
    said = warnings(write(form, "W4A16", layer_config={"q_proj": {"bits": 8}}))
    assert f"{BLOCK}.self_attn: q_proj, k_proj, v_proj differ" in said
    assert "gate_proj" not in said


def test_a_float_member_of_a_fused_layer_is_found(write) -> None:
    said = warnings(write("llm_compressor", "FP8_STATIC", ignore_layers=("up_proj",)))
    assert f"{BLOCK}.mlp: gate_proj, up_proj differ" in said


def test_unlike_experts_are_found(write) -> None:
    path = write("auto_round", "W4A16", experts=2, layer_config={"experts.1": {"bits": 8}})
    assert f"{BLOCK}.mlp.experts: experts differ" in warnings(path)
    path = write("auto_round:auto_gptq", "W4A16", experts=2, ignore_layers=("experts.0",))
    assert "experts differ" in warnings(path)


def test_a_list_of_experts_without_a_key_is_found(write) -> None:
    path = write("auto_round", "W4A16", experts=2, layer_config={"experts": {"bits": 8}})
    edit(path, lambda c: c["extra_config"].pop(f"{BLOCK}.mlp.experts"))
    assert "vLLM looks for the list" in warnings(path)
    whole = f"{BLOCK}.mlp.experts"
    path = write("auto_awq", "W4A16", experts=2, ignore_layers=("experts",))
    edit(path, lambda c: c["modules_to_not_convert"].remove(whole))
    assert f"{whole}: experts are listed, their list is not" in warnings(path)
    path = write("auto_gptq", "W4A16", experts=2, ignore_layers=("experts",))
    edit(path, lambda c: c["dynamic"].pop(f"-:.*{re.escape(whole)}$"))
    assert "a rule that does not mean the list" in warnings(path)


def test_unlike_tensor_scales_of_nvfp4_are_found(write) -> None:
    path = write("llm_compressor", "NVFP4")
    key = f"{K}.weight_global_scale"
    edit_tensors(path, lambda t: t.update({key: t[key] * 2}))
    said = warnings(path)
    assert f"{BLOCK}.self_attn: q_proj, k_proj, v_proj have unlike weight_global_scale" in said


def test_a_float_layer_that_the_config_does_not_name_is_found(write) -> None:
    for form, name, key in (
        ("auto_round", "W4A16", "extra_config"),
        ("auto_gptq", "W4A16", "dynamic"),
        ("auto_awq", "W4A16", "modules_to_not_convert"),
        ("llm_compressor", "FP8_STATIC", "ignore"),
        ("fp8", "FP8_BLOCK", "modules_to_not_convert"),
    ):
        path = write(form, name, ignore_layers=("down_proj",))
        assert warnings(path) == ""
        edit(path, lambda c, key=key: c.update({key: type(c[key])()}))
        assert f"{DOWN}: is stored as floats, but {key}" in warnings(path), form


def test_a_tied_head_is_a_layer_too(write) -> None:
    path = write("fp8", "FP8_BLOCK")
    whole = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(whole))
    edit_tensors(path, lambda t: t.pop("lm_head.weight"))
    assert warnings(path) == ""
    edit(path, lambda c: c["modules_to_not_convert"].remove("lm_head"))
    assert "lm_head: is stored as floats" in warnings(path)


def test_zero_points_of_symmetric_weights_are_found(write) -> None:
    path = write("llm_compressor", "W4A16")
    key = f"{Q}.weight_zero_point"
    edit_tensors(path, lambda t: t.update({key: torch.zeros(16, 4, dtype=torch.int32)}))
    assert f"{Q}: is symmetric and has zero points" in warnings(path)


def test_formats_of_groups_that_differ_need_mixed_precision(write) -> None:
    path = write("llm_compressor", "NVFP4", layer_config={"self_attn": "FP8_STATIC"})
    edit(path, lambda c: c.update(format="nvfp4-pack-quantized"))
    assert "format must be mixed-precision" in warnings(path)


def entry_kinds(form: str, plan: Any, config: dict[str, Any]) -> dict[str, Any]:
    from ar_export import LayerEntry
    from ar_kernels.hf.compressed import format_of

    out = {}
    for row in plan.quantized:
        order = ""
        if form == "llm_compressor":
            order = LAYOUTS[format_of(row.scheme.weight, row.scheme.activation)]
        out[row.layer.name] = LayerEntry(row.scheme, row.layer.rows, row.layer.columns, order)
    return out


VLLM, SGLANG = "vLLM 0.33", "SGLang 0.5"
BOTH = {VLLM, SGLANG}
WITHOUT = {
    "auto_round": {
        **dict.fromkeys(("W5A16", "W6A16", "W7A16", "MXFP4", "MXFP8", "FP8_BLOCK"), {SGLANG}),
        **dict.fromkeys(("MXINT4", "NVFP4", "NVFP4_E5M3", "FPW8A16", "FP8_STATIC"), BOTH),
        "GGUF:Q5_0": {SGLANG},
    },
    "auto_gptq": dict.fromkeys(("W2A16", "W3A16"), {VLLM}),
    "llm_compressor": {
        **dict.fromkeys(("W2A16", "W3A16", "W5A16", "W6A16", "W7A16"), {SGLANG}),
        **dict.fromkeys(("MXFP4", "MXFP8", "INT4", "GGUF:Q5_0"), {SGLANG}),
    },
}
"""Engines that have no way to run a scheme in a format; none for what is not listed."""


@pytest.mark.parametrize("form", ["auto_round", "auto_gptq", "auto_awq", "llm_compressor", "fp8"])
def test_notes_say_which_engine_has_no_way_to_run_it(form, tmp_path) -> None:
    found = format(form)
    for one in schemes().values():
        plan = make_plan(rows_of(*FUSED), LayerRules(one))
        request = ExampleRequest(tmp_path / "x", plan, form, None, CONFIG)
        try:
            check_plan(found, request)
            config = found.config(request)
        except ExportError:
            continue
        opened = Checkpoint(
            tmp_path, CONFIG, config, form, {}, {}, entry_kinds(form, plan, dict(config or {}))
        )
        engines = {f.what.partition(" does")[0] for f in lint(opened) if f.level == "note"}
        name = one.name.removesuffix("G64").removesuffix("G32")
        assert engines == WITHOUT.get(form, {}).get(name, set()), one.name


def test_notes_on_asymmetric_weights(write) -> None:
    for form, bits, engines in (
        ("auto_round", 4, set()),
        ("auto_round", 2, BOTH),
        ("auto_gptq", 4, {VLLM}),
        ("llm_compressor", 4, set()),
    ):
        path = write(form, f"W{bits}A16", overrides={"sym": False, "group_size": 32})
        notes = {
            f.what.partition(" does")[0] for f in lint(open_checkpoint(path)) if f.level == "note"
        }
        assert notes == engines, (form, bits)


def test_a_float_checkpoint_has_nothing_to_check(write) -> None:
    assert list(lint(open_checkpoint(write("fake", "W4A16")))) == []


def test_e5m3_as_auto_round_writes_it_for_compressed_tensors_is_read_and_noted(write) -> None:
    path = write("auto_round", "NVFP4_E5M3")
    wanted = {n: open_checkpoint(path).weight(n) for n in open_checkpoint(path).quantized}
    args = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group"}
    args |= {"group_size": 16, "dynamic": False}
    config = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-e5m3-pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": args,
                "input_activations": {**args, "dynamic": "local"},
            }
        },
    }
    edit(path, lambda c: (c.clear(), c.update(config)))
    found = open_checkpoint(path)
    assert found.format == "llm_compressor"
    for name, weight in wanted.items():
        assert torch.equal(found.weight(name).dequantize(), weight.dequantize())
    said = {f.what.partition(" does")[0] for f in lint(found) if f.level == "note"}
    assert said == BOTH
    with pytest.raises(ExportError, match="knows no E5M3 scales"):
        check_plan(
            format("llm_compressor"),
            ExampleRequest(
                path / "x",
                make_plan(rows_of(*FUSED), LayerRules(scheme("NVFP4_E5M3"))),
                "llm_compressor",
                None,
                CONFIG,
            ),
        )
