"""Checkpoints with quantized activations run as the tuner's own model does, in every format."""

from __future__ import annotations

import pytest
import torch

from ar_export import open_checkpoint
from ar_kernels import QuantLinear
from ar_kernels.numerics.activation import fake_quant_activation
from ar_tuner import AutoRound

transformers = pytest.importorskip("transformers")

IDS = torch.arange(48).reshape(2, 24)
CASES = [
    *((scheme, "auto_round") for scheme in ("MXFP4", "MXFP8", "MXINT4", "NVFP4", "NVFP4_E5M3")),
    *((scheme, "auto_round") for scheme in ("FP8_STATIC", "FP8_BLOCK")),
    *((scheme, "llm_compressor") for scheme in ("MXFP4", "MXFP8", "NVFP4", "INT8", "INT4")),
    *((scheme, "llm_compressor") for scheme in ("FP8_STATIC", "FP8_BLOCK")),
    ("FP8_BLOCK", "fp8"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return the directory of a random model whose widths are multiples of 128."""
    config = transformers.Qwen3Config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=256,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("activations") / "model"
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    return path


def quantizing_hook(spec, static):
    def hook(module, args):  # noqa: ARG001
        return (fake_quant_activation(args[0], spec, static=static).to(args[0].dtype),)

    return hook


@pytest.mark.parametrize(("scheme", "form"), CASES, ids=[f"{s}-{f}" for s, f in CASES])
def test_logits_are_those_of_the_tuned_model_to_the_bit(
    tmp_path, source, scheme, form, monkeypatch
) -> None:
    monkeypatch.setenv("AR_BACKEND", "dense")  # kernels sum in another order
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 256, (32,), generator=generator) for _ in range(4)]
    tuner = AutoRound(str(source), scheme=scheme, recipe="rtn", dataset=rows, seqlen=32, nsamples=4)
    written = tuner.quantize_and_save(tmp_path / "out", format=form)
    tuned, found = written.model, open_checkpoint(written.path)
    for name, entry in found.quantized.items():
        spec, extra = entry.scheme.activation, found.weight(name).extra
        assert spec is not None
        static = extra.get("input_scale", extra.get("input_global_scale"))
        assert (static is None) == (spec.dynamic and spec.data_type != "nv_fp4_with_static_gs")
        tuned.get_submodule(name).register_forward_pre_hook(quantizing_hook(spec, static))
    opened = transformers.AutoModelForCausalLM.from_pretrained(written.path, dtype="auto")
    layers = [m for m in opened.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == len(found.quantized) == 14
    with torch.inference_mode():
        ours, theirs = opened(IDS).logits, tuned(IDS).logits
    assert torch.equal(ours, theirs)


def test_a_checkpoint_is_saved_as_it_was_read(tmp_path, source) -> None:
    from safetensors.torch import load_file

    rows = [torch.arange(i, i + 32) for i in range(4)]
    tuner = AutoRound(str(source), scheme="NVFP4", recipe="rtn", dataset=rows, seqlen=32)
    path = tuner.quantize_and_save(tmp_path / "a", format="llm_compressor").path
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model(IDS)
    model.save_pretrained(tmp_path / "b")
    before, after = (load_file(p / "model.safetensors") for p in (path, tmp_path / "b"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
