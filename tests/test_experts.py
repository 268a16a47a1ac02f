"""Mixture-of-experts models from float files to quantized ones and back, in every format."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers as t

from ar_export import open_checkpoint, open_dequantized, verify
from ar_tuner import AutoRound
from ar_tuner.activations import quantized_activations, static_ranges
from ar_tuner.adapters import GenericAdapter
from ar_tuner.algorithms.base import Target
from ar_tuner.blocks import find_blocks, weights_of

if TYPE_CHECKING:
    from pathlib import Path

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
LINEAR |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", FOUR | {"head_dim": 16}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16}
        | {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 96},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        LATENT
        | {"num_key_value_heads": 4, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 2}
        | {"topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        | {"first_k_dense_replace": 1},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        FOUR
        | LINEAR
        | {"shared_expert_intermediate_size": 64, "head_dim": 16}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
}
FORMATS = (
    ("auto_round", "W4A16G32"),
    ("auto_gptq", "W4A16G32"),
    ("auto_awq", "W4A16G32"),
    ("llm_compressor", "W4A16G32"),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Save a tiny random model of a type once."""
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            model_class, config_class, more = MODELS[kind]
            model = getattr(t, model_class)(getattr(t, config_class)(**{**SMALL, **more}))
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
        return made[kind]

    return save


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("form", "scheme"), FORMATS, ids=[f[0] for f in FORMATS])
def test_a_file_opens_with_the_logits_of_the_tuned_model(
    kind, form, scheme, saved, tmp_path
) -> None:
    pytest.importorskip("ar_kernels.hf.experts", reason="loads experts packed one by one")
    reports = []

    def check(path: Path, weight_of: Any, tuned: Any) -> None:
        reports.append(verify(path, expected=weight_of, against=tuned))

    job = AutoRound(saved(kind), scheme=scheme, recipe="rtn")
    job.quantize_and_save(tmp_path / "out", form, check=check)
    (report,) = reports
    assert report.ok, report.findings
    assert report.logits is not None
    experts = [n for n in open_checkpoint(tmp_path / "out").quantized if ".experts." in n]
    assert len(experts) == (12 if kind == "deepseek_v3" else 24)


@pytest.mark.parametrize("kind", MODELS)
def test_dequantized_files_make_the_same_model(kind, saved, tmp_path) -> None:
    job = AutoRound(saved(kind), scheme="W4A16G32", recipe="rtn")
    tuned, path = job.quantize_and_save(tmp_path / "out", "auto_round")
    opened = open_dequantized(open_checkpoint(path), torch.float32)
    ids = torch.arange(2, 30)[None]
    with torch.inference_mode():
        wanted, got = tuned.float()(ids).logits, opened(ids).logits
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", MODELS)
def test_dequantized_floats_open_as_the_float_model_does(kind, saved, tmp_path) -> None:
    job = AutoRound(saved(kind), scheme="W4A16G32", recipe="rtn")
    tuned, path = job.quantize_and_save(tmp_path / "out", "fake")
    opened, report = type(tuned).from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(2, 30)[None]
    with torch.inference_mode():
        wanted, got = tuned(ids).logits, opened.eval()(ids).logits
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_gguf_files_hold_all_experts_of_a_layer_in_one_tensor(kind, saved, tmp_path) -> None:
    gguf = pytest.importorskip("gguf")
    source = saved(kind)
    _tokenizer(source)
    reports = []

    def check(path: Path, weight_of: Any, tuned: Any) -> None:
        reports.append(verify(path, expected=weight_of, against=tuned))

    job = AutoRound(source, scheme="GGUF:Q4_0", recipe="rtn")
    _, path = job.quantize_and_save(tmp_path / "out", "gguf:q4_0", check=check)
    assert reports[0].ok, reports[0].findings
    assert reports[0].compared >= 24
    tensors = {x.name: x for x in gguf.GGUFReader(next(path.glob("*.gguf"))).tensors}
    for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        found = tensors[f"blk.1.{name}.weight"]
        assert found.tensor_type.name == "Q4_0"
        assert found.shape.tolist()[2] == 4
    assert tensors["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:127]
    vocab = {token: i for i, token in enumerate(alphabet)} | {"ab": 127}
    made = Tokenizer(models.BPE(vocab, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4"])
@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4", "FP8_STATIC"])
def test_activations_of_experts_are_quantized_as_they_are_tuned(
    kind, scheme, saved, tmp_path, monkeypatch
) -> None:
    pytest.importorskip("ar_kernels.hf.experts", reason="loads experts packed one by one")
    monkeypatch.setenv("AR_BACKEND", "dense")  # kernels sum in another order
    rows = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(1))
    job = AutoRound(saved(kind), scheme=scheme, recipe="rtn", dataset=rows, nsamples=8, seqlen=32)
    tuned, path = job.quantize_and_save(tmp_path / "out", "llm_compressor")
    found = open_checkpoint(path)
    weights = {name: found.weight(name) for name in found.quantized}
    opened = type(tuned).from_pretrained(path, dtype=torch.float32).eval()
    plan = job.plan()
    ids = torch.arange(2, 30)[None]
    with contextlib.ExitStack() as stack, torch.inference_mode():
        got = opened(ids).logits
        plain = tuned(ids).logits
        for block in find_blocks(tuned, GenericAdapter()).blocks:
            refs = weights_of(block, list(weights))
            targets = [Target(ref, plan[ref.layer].scheme) for ref in refs]
            ranges = static_ranges({ref.layer: weights[ref.layer] for ref in refs})
            stack.enter_context(quantized_activations(block.module, targets, ranges))
        wanted = tuned(ids).logits
    size = float(wanted.abs().max())
    assert float((got - wanted).abs().max()) < 1e-3 * size
    assert float((plain - wanted).abs().max()) > 1e-2 * size
