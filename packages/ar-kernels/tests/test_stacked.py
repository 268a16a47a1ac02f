"""Experts packed in one tensor for all of them, as the files of gpt-oss hold them."""

from __future__ import annotations

import json

import pytest
import torch

from ar_kernels import KernelError, QuantLinear, data_type, layout
from ar_kernels.native import arena
from ar_schemes import scheme

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

IDS = torch.arange(24).reshape(2, 12)
EXPERTS = "model.layers.0.mlp.experts"


def model_of():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        pad_token_id=0,
        max_position_embeddings=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "router.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def write(folder):
    """Write a checkpoint whose experts are stacked and packed; return its tensors."""
    model = model_of()
    model.save_pretrained(folder)
    tensors = safetensors.load_file(folder / "model.safetensors")
    spec, numbers = scheme("MXFP4").weight, data_type("mx_fp")
    for key in [k for k in tensors if k.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales = [], []
        for stored in tensors.pop(key).float():
            weight = stored.t().contiguous()  # files hold [I, O], and packed [O, I]
            found = numbers.quantize(weight, spec, numbers.search(weight, spec))
            packed = layout("ct_mxfp4").pack(found)
            scales.append(packed["weight_scale"])
            blocks.append(packed["weight_packed"].reshape(len(weight), -1, 16))
        tensors |= {f"{key}_blocks": torch.stack(blocks), f"{key}_scales": torch.stack(scales)}
    rewrite(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def rewrite(folder, tensors) -> None:
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def opened(folder, **kwargs):
    kwargs = {"dtype": torch.float32} | kwargs
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def dequantized(folder, **kwargs):
    """Return the model as transformers itself opens it, with float experts."""
    asked = transformers.Mxfp4Config(dequantize=True)
    return opened(folder, quantization_config=asked, **kwargs)


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def layers(model) -> dict[str, QuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def test_logits_are_those_of_the_experts_dequantized_by_transformers(tmp_path) -> None:
    write(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    mine, report = load(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    reference = dequantized(tmp_path)
    assert not layers(reference)
    assert len(layers(mine)) == 2 * 4 * 2
    torch.testing.assert_close(logits(mine), logits(reference))


def test_bfloat16_too(tmp_path) -> None:
    write(tmp_path)
    mine = opened(tmp_path, dtype=torch.bfloat16)
    reference = dequantized(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(logits(mine), logits(reference), atol=0.02, rtol=0.02)


def test_the_stacked_tensors_are_let_go_for_the_backend_s(tmp_path) -> None:
    tensors = write(tmp_path)
    mine = opened(tmp_path)
    codes = sum(t.nbytes for k, t in tensors.items() if k.endswith("_blocks"))
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in mine.buffers()}
    assert {m.backend for m in layers(mine).values()} <= {"cpu_native", "dense", "reference"}
    if next(iter(layers(mine).values())).backend == "cpu_native":
        # 64-row strips, float scales; settled weights begin at a large page
        assert sum(held.values()) < 2 * codes + arena.PAGE


def test_saving_writes_the_same_tensors_and_config(tmp_path) -> None:
    first = write(tmp_path / "a")
    opened(tmp_path / "a", dtype="auto").save_pretrained(tmp_path / "b")
    second = safetensors.load_file(tmp_path / "b" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in "ab"]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_a_state_dict_comes_back_where_it_came_from(tmp_path) -> None:
    write(tmp_path)
    mine, other = opened(tmp_path), opened(tmp_path)
    expected, state = logits(mine), mine.state_dict()
    changed = {k: v.flip(1) if k.endswith("_blocks") else v for k, v in state.items()}
    other.load_state_dict(changed)
    assert not torch.allclose(logits(other), expected)
    other.load_state_dict(state)
    assert torch.equal(logits(other), expected)


def test_a_backend_can_be_asked_for(tmp_path) -> None:
    from ar_kernels.hf import ask_for

    write(tmp_path)
    mine = opened(tmp_path, quantization_config=ask_for("reference", "mxfp4"))
    assert {m.backend for m in layers(mine).values()} == {"reference"}
    torch.testing.assert_close(logits(mine), logits(opened(tmp_path)))


def test_shards_and_a_device_map(tmp_path) -> None:
    write(tmp_path / "a")
    opened(tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size="50KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    mine = opened(tmp_path / "b", device_map={"": "cpu"})
    assert torch.equal(logits(mine), logits(opened(tmp_path / "a")))


def test_it_becomes_a_float_model(tmp_path) -> None:
    write(tmp_path)
    mine = opened(tmp_path)
    mine.dequantize()
    assert not layers(mine)
    torch.testing.assert_close(logits(mine), logits(dequantized(tmp_path)))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (f"{EXPERTS}.down_proj_scales", r"down_proj_scales must be for 4 experts.* hold nothing"),
        (f"{EXPERTS}.down_proj_blocks", r"hold gate_up_proj packed, and the others not"),
    ],
)
def test_a_lost_tensor_is_found_before_loading(tmp_path, lost, message) -> None:
    tensors = write(tmp_path)
    del tensors[lost]
    rewrite(tmp_path, tensors)
    with pytest.raises(KernelError, match=message):
        opened(tmp_path)


def test_experts_too_few_are_found_before_loading(tmp_path) -> None:
    tensors = write(tmp_path)
    key = f"{EXPERTS}.gate_up_proj_blocks"
    rewrite(tmp_path, tensors | {key: tensors[key][:3].clone()})
    with pytest.raises(KernelError, match=r"gate_up_proj_blocks must be for 4 experts"):
        opened(tmp_path)


def test_experts_compile_and_export_in_one_graph(tmp_path) -> None:
    write(tmp_path)
    experts = opened(tmp_path).get_submodule(EXPERTS)
    x, index = torch.randn(5, 64), torch.tensor([[0, 3], [3, 1], [1, 0], [0, 1], [3, 0]])
    weights = torch.rand(5, 2)
    with torch.inference_mode():
        wanted = experts(x, index, weights)
        torch.compiler.reset()
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, index, weights), wanted)
        other = index.flip(1)  # other experts, the same graph
        torch.testing.assert_close(compiled(x, other, weights), experts(x, other, weights))
    program = torch.export.export(experts, (x, index, weights))
    torch.testing.assert_close(program.module()(x, index, weights), wanted)


def test_the_whole_model_compiles_in_one_graph(tmp_path) -> None:
    write(tmp_path)
    mine = opened(tmp_path)
    torch.compiler.reset()
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        found = compiled(IDS, use_cache=False).logits
    torch.testing.assert_close(found, logits(mine), atol=1e-4, rtol=1e-4)


def test_numbers_beyond_the_last_expert_choose_none(tmp_path) -> None:
    write(tmp_path)
    experts = opened(tmp_path).get_submodule(EXPERTS)
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    index = torch.tensor([[0, 4], [4, 4], [2, 1]])
    with torch.inference_mode():
        out = experts(x, index, weights)
        assert bool((out[1] == 0).all())
        alone = experts(x[:1], index[:1, :1], weights[:1, :1])
    torch.testing.assert_close(out[:1], alone)


def test_experts_on_several_backends_give_the_same(tmp_path) -> None:
    write(tmp_path)
    mine = opened(tmp_path)
    wanted = logits(mine)
    mine.get_submodule(EXPERTS).get_submodule("1.gate_up_proj").prepare("reference")
    torch.testing.assert_close(logits(mine), wanted)


def test_adapters_train_through_the_experts(tmp_path) -> None:
    write(tmp_path)
    mine, reference = opened(tmp_path), dequantized(tmp_path)
    grads = []
    for model in (mine, reference):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().mean().backward()
        grads.append(embedded.grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)
