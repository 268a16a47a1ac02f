"""Models that see as two GGUF files: the text model, and an mmproj file for the rest.

What libmtmd makes of the second is compared by tests/interop/mmproj.py, where it is installed.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ar_export import ExportError, convert, open_checkpoint, verify
from ar_tuner import AutoRound
from ar_vlm.testing import make_tiny

if TYPE_CHECKING:
    from pathlib import Path

gguf = pytest.importorskip("gguf")

FAMILIES = {
    "llava": ("mlp", "llama"),
    "gemma3": ("gemma3", "gemma3"),
    "idefics3": ("idefics3", "llama"),
    "internvl": ("internvl", "qwen2"),
    "mistral3": ("pixtral", "llama"),
    "qwen2_vl": ("qwen2vl_merger", "qwen2vl"),
    "qwen2_5_vl": ("qwen2.5vl_merger", "qwen2vl"),
    "qwen3_vl": ("qwen3vl_merger", "qwen3vl"),
}
"""Projector type and text architecture of each."""
UNUSED = {"llava": 2, "gemma3": 11}
"""Tensors that llama.cpp has no place for: the norm behind the last layer, a pooling head."""


def written(source: Path, out: Path) -> Path:
    job = AutoRound(source, scheme="GGUF:Q8_0", recipe="rtn")
    return job.quantize_and_save(out, "gguf:q8_0", check=_check).path


def _check(path, find, model) -> None:
    report = verify(path, expected=find, against=model)
    assert report.ok, report.findings
    assert report.layers == report.compared > 0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Return source and GGUF directory of each family, made once."""
    out = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        source = make_tiny(family, folder / "source")
        out[family] = source, written(source, folder / "out")
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_both_files_together_hold_every_tensor_of_the_checkpoint(family, checkpoints) -> None:
    source, out = (open_checkpoint(path) for path in checkpoints[family])
    assert set(out.names) == set(source.names)
    plain = set(source.names) - {f"{layer}.weight" for layer in out.quantized}
    for name in plain:
        mine, theirs = out.tensor(name), source.tensor(name)
        assert mine.shape == theirs.shape == tuple(out.facts[name].shape), name
        assert torch.allclose(mine.float(), theirs.float(), atol=1e-3), name
    eyes = [n for n in plain if out.files[n].name.startswith("mmproj-")]
    assert any("proj" in n for n in eyes)
    assert all("lm_head" not in n and "embed_tokens" not in n for n in eyes)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_facts_are_those_that_llama_cpp_asks_for(family, checkpoints) -> None:
    folder = checkpoints[family][1]
    eyes = gguf.GGUFReader(next(folder.glob("mmproj-*.gguf")))
    text = gguf.GGUFReader(next(f for f in folder.glob("*.gguf") if "mmproj" not in f.name))
    said = {name: field.contents() for name, field in eyes.fields.items()}
    projector, architecture = FAMILIES[family]
    assert text.fields["general.architecture"].contents() == architecture
    assert said["general.architecture"] == "clip"
    assert said["general.type"] == "mmproj"
    assert said["clip.projector_type"] == projector
    config = json.loads((folder / "config.json").read_text())
    assert said["clip.vision.projection_dim"] == config["text_config"]["hidden_size"]
    assert len(said["clip.vision.image_mean"]) == len(said["clip.vision.image_std"]) == 3
    names = [t.name for t in eyes.tensors]
    assert len([n for n in names if n.startswith("ar.")]) == UNUSED.get(family, 0)
    ends = (r"\.(weight|bias)(\.1)?$", "$")
    names_there = (re.escape(v).replace(r"\{bid\}", r"\d+") for v in gguf.TENSOR_NAMES.values())
    known = re.compile("|".join(f"{name}({'|'.join(ends)})" for name in names_there))
    assert [n for n in names if not n.startswith("ar.") and not known.match(n)] == []
    blocks = {int(n.split(".")[2]) for n in names if n.startswith("v.blk.")}
    assert blocks >= set(range(said["clip.vision.block_count"]))


def test_row_orders_and_offsets_are_llama_cpps(checkpoints) -> None:
    source, out = (checkpoints["mistral3"][i] for i in (0, 1))
    stored = {t.name: t for t in gguf.GGUFReader(next(out.glob("mmproj-*.gguf"))).tensors}
    floats = open_checkpoint(source)
    key = next(n for n in floats.names if n.endswith("layers.0.attention.q_proj.weight"))
    wanted, got = floats.tensor(key), torch.tensor(stored["v.blk.0.attn_q.weight"].data)
    half = wanted.shape[0] // 2 // 2  # two heads: row 1 of the first is the begin of its other half
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[half])
    row = torch.tensor(stored["v.token_embd.img_break"].data)
    token = next(
        t["id"]
        for t in json.loads((source / "tokenizer.json").read_text())["added_tokens"]
        if t["content"] == "[IMG_BREAK]"
    )
    table = floats.tensor(next(n for n in floats.names if n.endswith("embed_tokens.weight")))
    assert torch.allclose(row.float(), table[token].float(), atol=0.01)
    source, out = (checkpoints["gemma3"][i] for i in (0, 1))
    stored = {t.name: t for t in gguf.GGUFReader(next(out.glob("mmproj-*.gguf"))).tensors}
    floats = open_checkpoint(source)
    key = next(n for n in floats.names if n.endswith("mm_soft_emb_norm.weight"))
    norm = torch.tensor(stored["mm.soft_emb_norm.weight"].data)
    assert torch.allclose(norm, floats.tensor(key).float() + 1)


def test_qkv_is_taken_apart_and_frames_are_two_convolutions(checkpoints) -> None:
    source, out = (checkpoints["qwen2_5_vl"][i] for i in (0, 1))
    stored = {t.name: t for t in gguf.GGUFReader(next(out.glob("mmproj-*.gguf"))).tensors}
    floats = open_checkpoint(source)
    key = next(n for n in floats.names if n.endswith("blocks.0.attn.qkv.weight"))
    parts = floats.tensor(key).chunk(3)
    for name, part in zip(("attn_q", "attn_k", "attn_v"), parts, strict=True):
        assert torch.equal(torch.tensor(stored[f"v.blk.0.{name}.weight"].data), part)
    key = next(n for n in floats.names if n.endswith("patch_embed.proj.weight"))
    for i, name in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):
        found = torch.tensor(stored[name].data)
        assert torch.equal(found, floats.tensor(key)[:, :, i])


def test_the_two_files_convert_back(checkpoints, tmp_path) -> None:
    source, out = checkpoints["qwen2_vl"]
    back = open_checkpoint(convert(out, tmp_path / "back", "fake"))
    assert set(back.names) == set(open_checkpoint(source).names)


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("mllama", {}, "'mllama' with a 'mllama_vision_model' tower sees, and no mmproj"),
        ("llava", {"layer_config": {"vision_tower": "GGUF:Q8_0"}}, "holds floats only"),
    ],
)
def test_what_cannot_be_written_is_refused_before_work(family, options, why, tmp_path) -> None:
    source = make_tiny(family, tmp_path / "source")
    job = AutoRound(source, scheme="GGUF:Q8_0", recipe="rtn", **options)
    with pytest.raises(ExportError, match=why):
        job.quantize_and_save(tmp_path / "out", "gguf:q8_0")
    assert not (tmp_path / "out").exists()


def test_a_model_without_word_of_its_images_is_refused(checkpoints, tmp_path) -> None:
    source: Any = tmp_path / "source"
    shutil.copytree(checkpoints["llava"][0], source)
    (source / "processor_config.json").unlink()
    with pytest.raises(ExportError, match="image_mean and image_std are neither"):
        written(source, tmp_path / "out")


def test_pixtral_without_the_token_that_ends_rows_is_refused(checkpoints, tmp_path) -> None:
    source: Any = tmp_path / "source"
    shutil.copytree(checkpoints["mistral3"][0], source)
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text.replace("[IMG_BREAK]", "[OTHER]"))
    with pytest.raises(ExportError, match=r"needs the token \[IMG_BREAK\]"):
        written(source, tmp_path / "out")
