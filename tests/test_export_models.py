"""Models that formats have to take care of: Conv1D, tied heads, shards, layers beyond the model."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ar_export import convert, open_checkpoint, open_dequantized, verify
from ar_tuner import AutoRound, TunerError

if TYPE_CHECKING:
    from pathlib import Path

RTN: dict[str, Any] = {"recipe": "rtn", "nsamples": 2, "seqlen": 16}
TOKENS = [torch.arange(16)[None], torch.arange(16, 32)[None]]
EVERY = (
    ("auto_round", "W4A16G32", {}),
    ("auto_round", "W4A16G32", {"sym": False}),
    ("auto_round", "MXFP4", {}),
    ("auto_gptq", "W8A16G32", {}),
    ("auto_awq", "W4A16G32", {}),
    ("llm_compressor", "W3A16G32", {}),
    ("llm_compressor", "NVFP4", {}),
    ("llm_compressor", "FP8_STATIC", {}),
    ("mlx", "W5A16G32", {"sym": False}),
    ("gguf:q4_0", "GGUF:Q4_0", {}),
    ("fake", "W2A16G32", {}),
)
IDS = [f"{form}-{name}{'-asym' if options else ''}" for form, name, options in EVERY]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small GPT-2, whose layers are Conv1D with weights [I, O] and biases."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=64, n_layer=1, n_head=2, n_positions=32, bos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.add_(torch.randn(value.shape) * 0.1)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(("form", "name", "options"), EVERY, ids=IDS)
def test_conv1d_layers_are_stored_as_linear_ones(gpt2, tmp_path, form, name, options) -> None:
    if form in ("auto_awq", "mlx"):
        pytest.skip("refused: see the next test")
    job = AutoRound(gpt2, scheme=name, dataset=TOKENS, **RTN, **options)
    model, path = job.quantize_and_save(tmp_path / "out", form)
    found = open_checkpoint(path)
    assert form == "fake" or len(found.quantized) >= 4
    for layer, entry in found.quantized.items():
        if "wte" in layer:
            continue
        ours = found.weight(layer).dequantize()
        assert (entry.rows, entry.columns) == tuple(ours.shape)
        assert torch.equal(model.get_submodule(layer).weight, ours.t()), layer
        assert f"{layer}.bias" in found.names
    opened = open_dequantized(found, torch.float32)
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        wanted, got = model(ids).logits, opened(ids).logits
    # in GGUF what is not quantized is stored in half precision
    allowed = 2e-2 if form.startswith("gguf") else 1e-5
    assert float((wanted - got).abs().max()) <= allowed * float(wanted.abs().max())
    assert verify(path).ok


def test_a_conversion_to_floats_turns_conv1d_layers_back(gpt2, tmp_path) -> None:
    model, first = AutoRound(gpt2, scheme="W4A16G32", **RTN).quantize_and_save(tmp_path / "one")
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        convert(first, tmp_path / "two", "fake"), dtype=torch.float32
    )
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        assert torch.allclose(opened.eval()(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize(("form", "why"), [("mlx", "mlx-lm transposes weights of gpt2")])
def test_conv1d_layers_are_refused_where_the_reader_would_turn_them(
    gpt2, tmp_path, form, why
) -> None:
    with pytest.raises(Exception, match=why):
        AutoRound(gpt2, scheme="W4A16G32", **RTN).quantize_and_save(tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "name", "options"), EVERY, ids=IDS)
def test_a_tied_head_is_stored_once_and_stays_as_it_is(
    demo_model, tmp_path, form, name, options
) -> None:
    job = AutoRound(demo_model, scheme=name, dataset=TOKENS, quant_lm_head=True, **RTN, **options)
    assert "shares its weight" in job.plan()["lm_head"].reason
    found = open_checkpoint(job.quantize_and_save(tmp_path / "out", form)[1])
    assert not [n for n in found.names if n.startswith("lm_head")]
    assert "lm_head" not in found.quantized
    assert found.config["tie_word_embeddings"]
    report = verify(found.path)
    assert report.ok
    assert "warning" not in {f.level for f in report.findings}


@pytest.mark.parametrize(
    ("form", "name"),
    [("auto_round", "W4A16"), ("llm_compressor", "NVFP4"), ("fp8", "FP8_BLOCK"), ("fake", "W4A16")],
)
def test_shards_are_bounded_and_indexed(ar, demo_model, tmp_path, form, name) -> None:
    done = ar(
        *("quantize", demo_model, "--scheme", name, "--format", form, "--recipe", "rtn"),
        *("--output", tmp_path / "out", "--max-shard-size", "500KB"),
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out"
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == sorted(p.name for p in path.glob("*.safetensors"))
    sizes = [(path / f).stat().st_size for f in files]
    largest = max(math.prod(s) for s in open_checkpoint(path).shapes.values()) * 4
    assert all(size <= 500_000 or size <= largest + 100_000 for size in sizes)
    stored = sum(t.numel() * t.element_size() for f in files for t in load_file(path / f).values())
    assert index["metadata"]["total_size"] == stored
    assert verify(path).ok


MTP = "mtp.layers.0.eh_proj"


def with_mtp(model: Path, folder: Path) -> Path:
    """Return a copy of a model with a layer that Transformers does not build."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        f"{MTP}.weight": torch.randn(128, 256).bfloat16(),
        "mtp.norm.weight": torch.ones(128),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def declared(config: dict[str, Any]) -> bool:
    """Tell whether a config says that the extra layer is not quantized."""
    extra = config.get("extra_config", {}).get(MTP, {}).get("bits") == 16
    dynamic = f"-:.*{MTP.replace('.', chr(92) + '.')}$" in config.get("dynamic", {})
    listed = any(MTP in config.get(k, ()) for k in ("ignore", "modules_to_not_convert"))
    return extra or dynamic or listed or config.get(MTP) is False


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *((f, "W4A16") for f in ("auto_round", "auto_gptq", "auto_awq", "llm_compressor", "mlx")),
        ("fp8", "FP8_BLOCK"),
        ("fake", "W4A16"),
    ],
)
def test_layers_beyond_the_model_are_copied_and_declared(demo_model, tmp_path, form, name) -> None:
    source = with_mtp(demo_model, tmp_path / "source")
    path = AutoRound(source, scheme=name, **RTN).quantize_and_save(tmp_path / "out", form)[1]
    found, floats = open_checkpoint(path), load_file(source / "model.safetensors")
    for key in (f"{MTP}.weight", "mtp.norm.weight"):
        assert torch.equal(found.tensor(key), floats[key])
    if form != "fake":
        assert declared(dict(found.quantization_config))
    report = verify(path)
    assert report.ok
    assert "warning" not in {f.level for f in report.findings}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "huge"])
@pytest.mark.parametrize("layer", ["model.layers.2.mlp.up_proj", "lm_head"])
def test_a_weight_that_is_no_number_is_refused_by_name(demo_model, tmp_path, layer, bad) -> None:
    source = tmp_path / "source"
    shutil.copytree(demo_model, source)
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{layer}.weight"][3, 5] = bad
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    job = AutoRound(source, scheme="W4A16", quant_lm_head=True, **RTN)
    with pytest.raises(TunerError, match=layer):
        job.quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
