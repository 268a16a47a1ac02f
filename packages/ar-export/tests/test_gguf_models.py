"""Whole models as GGUF files: Transformers' own reader and ours give the same logits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ar_export import ExportError, open_checkpoint, open_dequantized
from ar_export.formats.dtypes import config_dtype
from ar_export.gguf.architectures import ARCHITECTURES, architecture_of
from ar_export.gguf.metadata import metadata, rope_factors
from ar_export.gguf.mix import mixed, more
from ar_export.sink import ar_open_sink
from ar_export.testing.model import ExampleRequest
from ar_schemes import LayerInfo, LayerPlan, LayerRules, make_plan, scheme

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
FALCON = {k: SMALL[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")} | {
    "num_attention_heads": 4,
    "new_decoder_architecture": False,
    "multi_query": True,
    "alibi": False,
}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "llama-bias": ("Llama", SMALL | {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", SMALL),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4}),
    "qwen2": ("Qwen2", SMALL),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 128}),
    "qwen2_moe": ("Qwen2Moe", SMALL | MOE | {"shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3Moe", SMALL | MOE | {"head_dim": 16, "norm_topk_prob": True}),
    "gemma2": ("Gemma2", SMALL | {"head_dim": 256, "query_pre_attn_scalar": 256}),
    "gemma3": ("Gemma3", SMALL | {"head_dim": 256, "query_pre_attn_scalar": 256}),
    "phi3": ("Phi3", SMALL | {"pad_token_id": 0}),
    "stablelm": ("StableLm", SMALL),
    "starcoder2": ("Starcoder2", SMALL),
    "falcon": ("Falcon", FALCON),
    "gpt2": ("GPT2", GPT2),
    "olmo2": ("Olmo2", SMALL),
    "granite": ("Granite", SMALL),
    "smollm3": ("SmolLM3", SMALL | {"pad_token_id": 0}),
    "phi": ("Phi", SMALL),
    "gemma": ("Gemma", SMALL | {"head_dim": 16}),
}
READ_BY_TRANSFORMERS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"),
    *("stablelm", "starcoder2", "falcon"),
)
"""Those whose tiny shapes its reader can say; others it takes for models of the usual size."""


def build(name: str, folder: Path) -> Any:
    kind, settings = MODELS[name]
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    torch.manual_seed(0)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{head}")(config(**settings)).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "norm" in key or "bias" in key:  # what starts as one or zero hides mistakes
                value.add_(torch.randn(value.shape) * 0.1)
    model.save_pretrained(folder)
    tokenizer(folder, settings["vocab_size"])
    return model


def tokenizer(folder: Path, size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:size]
    vocab = {token: i for i, token in enumerate(alphabet[: size - 1])} | {"ab": size - 1}
    made = Tokenizer(models.BPE(vocab, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(folder / "tokenizer.json"))


def write(folder: Path, output: Path) -> Path:
    """Write the float model as a GGUF file."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    plan = LayerPlan(rows=(), default=scheme("BF16"))
    sink = ar_open_sink(ExampleRequest(output, plan, "gguf", folder, config))
    assert sink is not None
    for key, tensor in load_file(folder / "model.safetensors").items():
        sink.put_tensor(key, tensor)
    return sink.commit()


@pytest.mark.parametrize("name", MODELS)
def test_our_reader_gives_the_same_logits(name, tmp_path) -> None:
    model = build(name, tmp_path / "float")
    path = write(tmp_path / "float", tmp_path / "out")
    opened = open_dequantized(open_checkpoint(path), torch.float32)
    ids = torch.arange(2, 14)[None]
    with torch.inference_mode():
        wanted, got = model(ids).logits, opened(ids).logits
    assert float((wanted - got).abs().max()) < 4e-3 * float(wanted.abs().max())  # float16 weights


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_the_reader_of_transformers_gives_the_same_logits(name, tmp_path) -> None:
    model = build(name, tmp_path / "float")
    path = write(tmp_path / "float", tmp_path / "out")
    file = next(path.glob("*.gguf"))
    (path / "config.json").unlink()
    opened = type(model).from_pretrained(path, gguf_file=file.name, dtype=torch.float32)
    ids = torch.arange(2, 14)[None]
    with torch.inference_mode():
        wanted, got = model(ids).logits, opened.eval()(ids).logits
    assert float((wanted - got).abs().max()) < 4e-3 * float(wanted.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_same_probabilities(name, tmp_path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    model = build(name, tmp_path / "float")
    path = write(tmp_path / "float", tmp_path / "out")
    params = xllamacpp.CommonParams()
    params.model.path = str(next(path.glob("*.gguf")))
    params.n_ctx = 64
    params.warmup = False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    ids = list(range(3, 15))
    asked = {"prompt": ids, "n_predict": 1, "logprobs": 96, "temperature": 0}
    answer = server.handle_completions(asked)
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    theirs = {entry["id"]: entry["logprob"] for entry in top}
    assert len(theirs) > 40
    with torch.inference_mode():
        ours = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)
    worst = max(abs(float(ours[i]) - value) for i, value in theirs.items())
    assert worst < 0.02 * float(ours.max() - ours.min())


def test_an_architecture_without_a_loader_is_refused_before_work(tmp_path) -> None:
    request = ExampleRequest(
        tmp_path / "out",
        LayerPlan((), scheme("BF16")),
        "gguf:q4_0",
        None,
        {"architectures": ["OPTForCausalLM"], "vocab_size": 8},
    )
    with pytest.raises(ExportError, match="OPTForCausalLM"):
        ar_open_sink(request)
    assert not (tmp_path / "out").exists()


def test_every_architecture_is_tried_here() -> None:
    tried = {
        f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}" for kind, _ in MODELS.values()
    }
    seeing = {name for name in ARCHITECTURES if name.endswith("ForConditionalGeneration")}
    assert tried == set(ARCHITECTURES) - seeing  # those need a tower and a processor, too


def test_the_published_order_of_rows() -> None:
    from ar_export.gguf.rows import row_order

    arch = architecture_of({"architectures": ["LlamaForCausalLM"]})
    config = {"num_attention_heads": 1, "hidden_size": 8}
    assert row_order("blk.0.attn_q.weight", arch, config).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert row_order("blk.0.attn_v.weight", arch, config) is None


@pytest.mark.parametrize(
    ("n", "wanted"),
    [
        (32, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]),
        (28, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]),
        (4, [2, 3]),
        (2, [1]),
    ],
)
def test_which_blocks_get_more(n, wanted) -> None:
    assert [i for i in range(n) if more(i, n)] == wanted


def plan_of(n: int, preset: str, *, tied: bool = False, columns: int = 256, **rules) -> LayerPlan:
    rows = [LayerInfo("model.embed_tokens", 512, columns, None, role="embedding")]
    for i in range(n):
        block = f"model.layers.{i}"
        for name, count in (("q", 256), ("k", 64), ("v", 64), ("o", 256)):
            rows.append(LayerInfo(f"{block}.self_attn.{name}_proj", count, columns, block))
        for name in ("gate", "up", "down"):
            rows.append(LayerInfo(f"{block}.mlp.{name}_proj", 256, columns, block))
    rows.append(LayerInfo("lm_head", 512, columns, None, role="lm_head", tied=tied))
    return make_plan(rows, LayerRules(scheme(preset), **rules))


def types(plan: LayerPlan, end: str) -> list[str]:
    return [r.scheme.name.removeprefix("GGUF:") for r in plan.rows if r.layer.name.endswith(end)]


def test_the_mix_of_q4_k_m() -> None:
    plan = mixed(plan_of(4, "GGUF:Q4_K_M"), "Q4_K_M")
    assert types(plan, "v_proj") == types(plan, "down_proj") == ["Q4_K_S", "Q4_K_S", "Q6_K", "Q6_K"]
    assert set(types(plan, "q_proj")) == {"Q4_K_S"}
    assert types(plan, "lm_head") == ["Q6_K"]
    assert types(plan, "embed_tokens") == ["Q4_K_S"]


def test_a_tied_embedding_has_the_type_of_the_output() -> None:
    plan = mixed(plan_of(2, "GGUF:Q3_K_M", tied=True), "Q3_K_M")
    assert types(plan, "embed_tokens") == ["Q6_K"]
    assert types(plan, "lm_head") == ["BF16"]
    assert types(plan, "v_proj") == ["Q5_K_S", "Q5_K_S"]
    assert types(plan, "o_proj") == ["Q4_K_S", "Q4_K_S"]


def test_widths_that_are_no_multiple_of_256_fall_back() -> None:
    plan = mixed(plan_of(2, "Q5_0".join(("GGUF:", "")), columns=96), "Q4_K_M")
    assert set(types(plan, "q_proj")) == {"Q5_0"}
    assert types(plan, "lm_head") == ["Q8_0"]


def test_a_rule_of_the_user_stays() -> None:
    rules = {"layer_config": {"layers.1.mlp.down_proj": "GGUF:Q8_0"}, "ignore_layers": ("o_proj",)}
    plan = mixed(plan_of(2, "GGUF:Q4_K_M", **rules), "Q4_K_M")
    assert types(plan, "down_proj") == ["Q4_K_S", "Q8_0"]
    assert set(types(plan, "o_proj")) == {"BF16"}


def test_llama3_factors() -> None:
    config = {
        "head_dim": 128, "num_attention_heads": 32, "hidden_size": 4096,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    }  # fmt: skip
    factors = rope_factors(config)["rope_freqs.weight"]
    assert len(factors) == 64
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    assert all(a <= b for a, b in zip(factors, factors[1:], strict=False))


def test_metadata_has_what_llama_cpp_asks_for() -> None:
    config = {**SMALL, "architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "rms_norm_eps": 1e-6}
    made = metadata(config, architecture_of(config))
    assert made["attention.head_count_kv"] == 2
    assert made["attention.key_length"] == 32
    assert made["attention.layer_norm_rms_epsilon"] == 1e-6
    assert config_dtype(config) == torch.float32
