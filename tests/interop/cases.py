"""What is made for the readers: every scheme in every format, and what formats say in words."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from ar_export.matrix import support_matrix
from ar_tuner import AutoRound

if TYPE_CHECKING:
    from pathlib import Path

FORMATS = ("auto_round", "auto_gptq", "auto_awq", "llm_compressor", "fp8", "mlx", "gguf", "fake")
_LIKE = re.compile(r"^W\d+A16G(32|64)$|_W8A8$")
"""Schemes that differ from others by the group size or the name only."""
_WITH_ZEROS = ("W2A16", "W3A16", "W4A16", "W8A16")
ASYM = {"sym": False}
DOWN = {"layer_config": {"mlp.down_proj": {"bits": 8}}}
ATTENTION = {"layer_config": {"self_attn": {"bits": 8}}, "ignore_layers": ("layers.1.mlp",)}
HEAD = {"quant_lm_head": True}


@dataclass(frozen=True)
class Case:
    """One checkpoint to make: scheme, format as spelled, further options, and what they are."""

    scheme: str
    form: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    words: str = ""
    untied: bool = False

    @property
    def label(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^A-Za-z0-9_.]+", "-", f"{self.scheme} {self.words} {self.form}")

    @property
    def title(self) -> str:
        """What the page calls it."""
        return f"{self.scheme} {self.words}".strip()


SPELLED = (
    *(Case("W4A16", f"auto_round:{s}") for s in ("auto_gptq", "gptqmodel", "auto_awq")),
    *(Case("W4A16", f"auto_round:{s}", ASYM, "asym") for s in ("gptqmodel", "auto_awq")),
    *(Case(n, "auto_round:llm_compressor") for n in ("MXFP4", "MXFP8", "NVFP4")),
    Case("FP8_BLOCK", "auto_round:fp8"),
    *(Case("W4A16", "auto_gptq:gptq_v2", o, w) for o, w in (({}, ""), (ASYM, "asym"))),
)
"""Formats under their other names."""
MIXED = (
    *(
        Case("W4A16", f, DOWN, "with 8-bit down_proj")
        for f in ("auto_round", "auto_gptq", "llm_compressor", "mlx")
    ),
    *(
        Case("W4A16", f, ATTENTION, "with 8-bit attention, a 16-bit mlp")
        for f in ("auto_round", "auto_gptq", "llm_compressor", "mlx")
    ),
    Case("W4A16", "auto_awq", {"ignore_layers": ("layers.1.mlp",)}, "with a 16-bit mlp"),
    Case(
        "NVFP4", "llm_compressor", {"layer_config": {"self_attn": "FP8_STATIC"}}, "and FP8_STATIC"
    ),
    Case("FP8_BLOCK", "fp8", {"ignore_layers": ("layers.1.mlp",)}, "with a 16-bit mlp"),
)
"""Several schemes in one checkpoint."""
HEADS = tuple(
    Case("W4A16", f, HEAD, "with lm_head", untied=True)
    for f in ("auto_round", "auto_gptq", "auto_awq", "llm_compressor", "mlx")
)
"""A quantized output head, of a model that has one of its own."""


def cases(*, full: bool) -> list[Case]:
    """Return everything that is carried; without `full`, one group size of each."""
    out = []
    for name, row in support_matrix().items():
        if not full and _LIKE.search(name):
            continue
        for form in FORMATS:
            if row.get(form) is None and (form == "gguf") is name.startswith("GGUF:"):
                spelled = f"gguf:{name.removeprefix('GGUF:').lower()}" if form == "gguf" else form
                out.append(Case(name, spelled))
                if name.partition("G")[0] in _WITH_ZEROS and form != "fake":
                    out.append(Case(name, spelled, ASYM, "asym"))
    return [*out, *SPELLED, *MIXED, *HEADS]


def make(case: Case, model: Path, work: Path) -> Path:
    """Return the checkpoint of a case, rounded to nearest."""
    path = work / case.label
    source = untied(model, work / "untied") if case.untied else model
    settings = {"recipe": "rtn", "nsamples": 4, "seqlen": 32, "overwrite": True, **case.options}
    AutoRound(source, scheme=case.scheme, **settings).quantize_and_save(path, case.form)
    return path


def untied(model: Path, out: Path) -> Path:
    """Return a copy of a model whose head has a weight of its own."""
    if not out.is_dir():
        shutil.copytree(model, out)
        config = json.loads((out / "config.json").read_text()) | {"tie_word_embeddings": False}
        (out / "config.json").write_text(json.dumps(config))
        tensors = load_file(out / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
