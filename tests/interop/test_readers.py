"""Checkpoints of the embedded model, opened by readers that nobody here wrote."""

from __future__ import annotations

import json
import urllib.request

import pytest
import torch
import transformers

from ar_export import open_checkpoint, open_dequantized
from ar_tuner import AutoRound

COMPRESSED = (
    *("W2A16", "W3A16", "W4A16", "W5A16", "W8A16", "INT8", "INT4"),
    *("FP8_STATIC", "FP8_BLOCK", "FPW8A16", "NVFP4", "MXFP4", "MXFP8"),
)
VARIANTS = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l"),
    *("q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
)


@pytest.fixture(autouse=True)
def _stock_readers(monkeypatch) -> None:
    """Have Transformers read with what it brings, not with ar-kernels."""
    from transformers.quantizers import (
        auto,
        quantizer_compressed_tensors,
        quantizer_finegrained_fp8,
    )

    readers = {
        "compressed-tensors": (
            quantizer_compressed_tensors.CompressedTensorsHfQuantizer,
            transformers.CompressedTensorsConfig,
        ),
        "fp8": (
            quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer,
            transformers.FineGrainedFP8Config,
        ),
    }
    for method, (reader, config) in readers.items():
        monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, method, reader)
        monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, method, config)


def quantized(model, out, format: str, scheme: str | None = None, **options):
    settings = {"recipe": "rtn", "nsamples": 4, "seqlen": 32, **options}
    return AutoRound(model, scheme=scheme, **settings).quantize_and_save(out, format)[1]


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("scheme", COMPRESSED)
def test_compressed_tensors_dequantizes_to_our_weight(demo_model, tmp_path, scheme, sym) -> None:
    pytest.importorskip("compressed_tensors")
    if not sym and not (scheme.startswith("W") and "A16" in scheme):
        pytest.skip("has no zero point")
    options = {} if sym else {"sym": False}
    path = quantized(demo_model, tmp_path / "out", "llm_compressor", scheme, **options)
    wanted = open_checkpoint(path)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.bfloat16
    )
    # some compressors are undone when the model first runs
    model(torch.arange(8)[None])
    for name in wanted.quantized:
        theirs = model.get_submodule(name).weight
        ours = wanted.weight(name).dequantize(torch.float32)
        scale = wanted.weight(name).scale.dtype
        if theirs.dtype != torch.float32:  # they multiply in the type of the scale
            ours = ours.to(theirs.dtype)
        gap = (theirs.float() - ours.float()).abs()
        # one rounding of the product in bfloat16 apart at most
        assert float(gap.max()) <= 2**-7 * float(ours.abs().max()), (name, scale)
        assert float((gap > 0).float().mean()) < 0.02 or scale == torch.float8_e4m3fn, name


MIXES = {
    "bits": ("W4A16", {"layer_config": {"mlp.down_proj": {"bits": 8}}}),
    "attention": ("W4A16", {"layer_config": {"self_attn": {"bits": 8}}, "ignore_layers": "mlp"}),
    "kinds": ("NVFP4", {"layer_config": {"self_attn": "FP8_STATIC"}}),
}


@pytest.mark.parametrize("mix", MIXES)
def test_compressed_tensors_reads_several_groups(demo_model, tmp_path, mix) -> None:
    pytest.importorskip("compressed_tensors")
    scheme, options = MIXES[mix]
    path = quantized(demo_model, tmp_path / "out", "llm_compressor", scheme, **options)
    wanted = open_checkpoint(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model(torch.arange(8)[None])  # it decompresses when the model first runs
    for name in wanted.quantized:
        ours = wanted.weight(name).dequantize()
        theirs = model.get_submodule(name).weight.float()
        assert float((theirs - ours).abs().max()) <= 2**-7 * float(ours.abs().max()), name


def test_transformers_reads_native_fp8(demo_model, tmp_path) -> None:
    path = quantized(demo_model, tmp_path / "out", "fp8", "FP8_BLOCK")
    ours = open_dequantized(open_checkpoint(path), torch.bfloat16)
    config = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.bfloat16
    )
    for name in open_checkpoint(path).quantized:
        a, b = ours.get_submodule(name).weight, theirs.get_submodule(name).weight
        assert float((a - b).abs().max()) <= 2**-7 * float(a.abs().max()), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_what_we_do(demo_model, tmp_path, variant) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    path = quantized(demo_model, tmp_path / "out", f"gguf:{variant}")
    params = xllamacpp.CommonParams()
    params.model.path = str(next(path.glob("*.gguf")))
    params.n_ctx = 128
    params.warmup = False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = "def add(a, b):\n    return a + b  # it's 12345 \u00e9\u00df\n\n\nclass Foo:\n    pass\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    body = json.dumps({"content": text, "add_special": False}).encode()
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{server.listening_address}/tokenize", body, headers)
    with urllib.request.urlopen(asked) as answer:
        assert json.loads(answer.read())["tokens"] == ids
    made = server.handle_completions(
        {"prompt": ids, "n_predict": 1, "logprobs": 20, "temperature": 0}
    )
    top = made["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    model = open_dequantized(open_checkpoint(path), torch.float32)
    with torch.inference_mode():
        ours = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
    # llama.cpp quantizes activations to 8 bits before it multiplies
    worst = max(abs(float(ours[t["id"]]) - t["logprob"]) for t in top)
    assert worst < 0.05 * float(ours.max() - ours.min()), variant
