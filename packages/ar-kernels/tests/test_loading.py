"""How checkpoints are loaded: shards, devices, memory, the asked backend, odd files."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from ar_kernels import KernelError, QuantLinear, data_type, layout
from ar_schemes import scheme_from_dict

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

IDS = torch.arange(24).reshape(2, 12)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
W4 = {"bits": 4, "group_size": 32, "sym": True}
GPTQ = {"quant_method": "gptq", **W4, "desc_act": True, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "dynamic": False,
            },
        }
    },
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
METHODS = {
    "gptq": (GPTQ, "gptq_g_idx", {}),
    "awq": (AWQ, "awq", {"sym": False}),
    "compressed-tensors": (CT, "ct_pack", {}),
}


def write(
    folder,
    method: str,
    *,
    head: bool = False,
    shard: int | None = None,
    group: int = 32,
    **sizes: int,
):
    """Write a checkpoint of a random model; return the float32 model with its weights."""
    config, order, change = METHODS[method]
    if group != 32:  # compressed-tensors says it elsewhere
        config, change = config | {"group_size": group}, change | {"group_size": group}
    if head:
        config = config | ({"ignore": []} if method == "compressed-tensors" else {"lm_head": True})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen3Config(**SIZES | sizes, tie_word_embeddings=False)
    ).eval()
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    spec, numbers = scheme_from_dict(W4 | change).weight, data_type("int")
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or (name == "lm_head" and not head):
            continue
        weight = module.weight.data
        found = numbers.quantize(weight, spec, numbers.parameters(weight, spec))
        packed = layout(order).pack(found)
        if method == "gptq":  # an order of the channels as desc_act makes one
            columns = weight.shape[1]
            packed["g_idx"] = (torch.randperm(columns) // 32).int()
            found = layout(order).unpack(packed, spec, *weight.shape)
        module.weight.data = found.dequantize()
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
        del tensors[f"{name}.weight"]
    save(folder, tensors, model, config, shard)
    return model


def save(folder, tensors, model, config, shard=None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = [dict(list(tensors.items())[i :: shard or 1]) for i in range(shard or 1)]
    names = ["model.safetensors"]
    if shard:
        names = [f"model-{i + 1:05d}-of-{shard:05d}.safetensors" for i in range(shard)]
        where = {k: name for name, part in zip(names, parts, strict=True) for k in part}
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, part in zip(names, parts, strict=True):
        safetensors.save_file(part, folder / name, metadata={"format": "pt"})
    plain = {**model.config.to_dict(), "dtype": "float32", "quantization_config": config}
    plain["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(plain))


def opened(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def layers(model) -> dict[str, QuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def assert_same(mine, reference) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(mine(IDS).logits, reference(IDS).logits)


def all_tensors(folder):
    out = {}
    for path in folder.glob("*.safetensors"):
        out |= safetensors.load_file(path)
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", [False, True], ids=["", "with-head"])
def test_methods_load_run_and_save_as_they_were(tmp_path, method, head) -> None:
    reference = write(tmp_path / "a", method, head=head)
    mine, report = opened(tmp_path / "a", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert len(layers(mine)) == (15 if head else 14)
    assert_same(mine, reference)
    mine.save_pretrained(tmp_path / "b")
    first, second = all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert_same(opened(tmp_path / "b"), mine)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("places", ["cpu", {"": "cpu"}, "auto"], ids=["cpu", "map", "auto"])
def test_shards_and_device_maps(tmp_path, method, places) -> None:
    if places != "cpu":
        pytest.importorskip("accelerate")
    reference = write(tmp_path, method, shard=3)
    assert_same(opened(tmp_path, device_map=places), reference)


@pytest.mark.parametrize("method", METHODS)
def test_a_config_asks_for_a_backend(tmp_path, method) -> None:
    from ar_kernels.hf import ask_for

    write(tmp_path, method)
    for name in ("reference", "dense"):
        with pytest.warns(UserWarning, match="loading attributes"):
            mine = opened(tmp_path, quantization_config=ask_for(name, method))
        assert {m.backend for m in layers(mine).values()} == {name}
    with pytest.raises(KernelError, match="unknown quant_method 'gtpq'.*gptq"):
        ask_for("dense", "gtpq")


@pytest.mark.parametrize("kind", ["inference", "autocast"])
def test_inference_mode_and_autocast(tmp_path, kind) -> None:
    reference = write(tmp_path, "awq")
    mine = opened(tmp_path)
    if kind == "inference":
        assert_same(mine, reference)
        return
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = mine(IDS).logits, reference(IDS).logits
    # layers under autocast return the type they were given, float layers the narrow one
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert error < 0.03


def test_fp8_tiles_that_do_not_divide_a_layer(tmp_path) -> None:
    from ar_kernels.layouts.ragged import FP8_RAGGED, even_tiles

    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen3Config(**sizes, tie_word_embeddings=False)
    ).eval()
    tensors, ragged = {k: v.clone() for k, v in model.state_dict().items()}, 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        rows, columns = module.weight.shape
        high = -(-rows // 128), -(-columns // 128)
        scale = torch.rand(high) * 0.01 + 0.001
        wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        codes = (module.weight.data / wide).to(torch.float8_e4m3fn)
        module.weight.data = codes.float() * wide
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = codes, scale
        ragged += rows % 128 != 0 or columns % 128 != 0
    assert ragged == 6  # gate and up in rows, down in columns
    config = FP8 | {"modules_to_not_convert": ["lm_head", "down_proj"]}
    for name in [n for n in tensors if "down_proj" in n]:  # 192 columns hold no groups of 128
        del tensors[name]
    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            tensors[f"{name}.weight"] = module.weight.data.clone()
    save(tmp_path / "a", tensors, model, config)
    mine = opened(tmp_path / "a")
    gate = mine.model.layers[0].mlp.gate_proj
    assert (gate.layout, gate.spec.granularity) == (FP8_RAGGED.name, even_tiles(192, 128))
    for name, module in layers(mine).items():
        expected = model.get_submodule(name).weight
        assert torch.equal(module.quantized().dequantize(), expected), name
    mine.save_pretrained(tmp_path / "b")
    saved = all_tensors(tmp_path / "b")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[k].float(), tensors[k].float()) for k in tensors)


def test_packed_tensors_that_the_config_ignores_are_refused(tmp_path) -> None:
    write(tmp_path, "compressed-tensors")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"].append("re:.*q_proj")
    path.write_text(json.dumps(config))
    with pytest.raises(KernelError, match=r"(?s)2 layers .*leaves it in 16 bit, the files hold"):
        opened(tmp_path)


MEASURE = """
import sys, torch, transformers, ar_kernels
from ar_kernels import QuantLinear
def memory(what):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))
small = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = memory("VmRSS")
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
kinds = {m.backend for m in model.modules() if isinstance(m, QuantLinear)}
held = sum(b.nbytes for b in model.buffers()) + sum(p.nbytes for p in model.parameters())
print(memory("VmHWM") - before, held, *kinds)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_packed_size_and_a_layer(tmp_path) -> None:
    large = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    large |= {"num_attention_heads": 4, "head_dim": 128}
    write(tmp_path / "small", "awq")
    write(tmp_path / "large", "awq", group=128, **large)
    packed = (tmp_path / "large" / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown, held, *kinds = done.stdout.split()
    assert "dense" not in kinds
    layer = 512 * 2048 * 4  # a float32 or int32 per weight of the largest layer
    assert int(held) < 1.1 * packed
    # measured 49 to 57 MB for 33 packed, 58 to 65 with weights that settle in large pages (8 MB are
    # in memory twice); what is done with is given back, the file's pages too
    assert int(grown) < packed + 8 * layer + (8 << 20)
