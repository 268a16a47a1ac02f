"""An opened model: saved, generating, compiled, dequantized, on a chosen backend."""

from __future__ import annotations

import json

import pytest
import torch

from ar_kernels import KernelError
from ar_kernels.native import library

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


AUTO_ROUND = {"quant_method": "auto-round"}
GPTQ = {"quant_method": "gptq"}
IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("config", [AUTO_ROUND, GPTQ], ids=["auto-round", "gptq"])
def test_saving_writes_the_same_tensors_and_config(
    tmp_path, config, write, opened, assert_same_logits
) -> None:
    config = config | {"backend": "a-kernel-of-the-writer"}
    order = "gptq" if config["quant_method"] == "auto-round" else "gptq_g_idx"
    write(tmp_path / "a", config, kind="llama", bit_order=order)
    mine = opened(tmp_path / "a", dtype=torch.float32)
    mine(IDS)
    mine.save_pretrained(tmp_path / "b")
    first = safetensors.load_file(tmp_path / "a" / "model.safetensors")
    second = safetensors.load_file(tmp_path / "b" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(first[key].dtype is second[key].dtype for key in first)
    given, saved = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in "ab"
    )
    assert given == saved
    assert saved["backend"] == config["backend"]
    assert_same_logits(opened(tmp_path / "b", dtype=torch.float32), mine)


def test_it_generates(tmp_path, write, opened) -> None:
    reference = write(tmp_path, AUTO_ROUND)
    mine = opened(tmp_path, dtype=torch.float32)
    if library.missing() is None:  # norms of two blocks, their queries and keys, the last; the head
        kinds = [type(m).__name__ for m in mine.modules()]
        assert [kinds.count(kind) for kind in ("NativeNorm", "NativeLinear")] == [9, 1]
        assert mine.config._attn_implementation == "ar_native"
    out = [m.generate(IDS[:1], max_new_tokens=6, do_sample=False) for m in (mine, reference)]
    assert torch.equal(*out)


def test_the_whole_model_compiles_in_one_graph(tmp_path, write, opened) -> None:
    write(tmp_path, AUTO_ROUND)
    mine = opened(tmp_path, dtype=torch.float32)
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        logits = compiled(IDS, use_cache=False).logits
        torch.testing.assert_close(logits, mine(IDS).logits)


def test_dequantize_gives_back_a_float_model(
    tmp_path, write, opened, quantized, assert_same_logits
) -> None:
    reference = write(tmp_path, AUTO_ROUND, kind="llama")
    mine = opened(tmp_path, dtype=torch.float32)
    mine.dequantize()
    assert not quantized(mine)
    assert not hasattr(mine.config, "quantization_config")
    assert_same_logits(mine, reference)


def test_ar_backend_and_the_user_s_config_choose_the_backend(
    tmp_path, monkeypatch, write, opened, quantized
) -> None:
    write(tmp_path, AUTO_ROUND)
    monkeypatch.setenv("AR_BACKEND", "reference")
    assert {m.backend for m in quantized(opened(tmp_path)).values()} == {"reference"}
    asked = transformers.AutoRoundConfig(backend="dense")
    with pytest.warns(UserWarning, match="loading attributes"):
        mine = opened(tmp_path, quantization_config=asked)
    assert {m.backend for m in quantized(mine).values()} == {"dense"}
    monkeypatch.setenv("AR_BACKEND", "refrence")
    with pytest.raises(KernelError, match=r"unknown backend 'refrence'\. Did you mean reference"):
        opened(tmp_path)
