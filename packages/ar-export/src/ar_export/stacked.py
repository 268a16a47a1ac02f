"""Checkpoints of gpt-oss as OpenAI published them: MXFP4 experts, all of a layer in one tensor.

Read as if every expert had tensors of its own, under the names that ar-tuner writes single experts
of such a model under; `convert` then gives engines what they read. Nothing is written so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ar_export.errors import ExportError
from ar_export.formats.packed import entry
from ar_export.reader import Checkpoint
from ar_kernels.hf.fused import JOINED
from ar_kernels.hf.mxfp4 import LAYOUT, METHOD, parse_mxfp4
from ar_kernels.hf.stacked import SUFFIXES
from ar_kernels.layouts.base import TensorFact

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from ar_export.reader import Parts

_TURNS = ("gpt_oss",)
"""Model types whose gate and up rows take turns."""


@dataclass(frozen=True)
class Slice:
    """A tensor of one expert in a stack: rows `first`, `first + step`, ... of matrix `expert`."""

    stack: str
    expert: int
    first: int
    step: int


@dataclass(frozen=True)
class StackedCheckpoint(Checkpoint):
    """A checkpoint some of whose tensors are slices of larger ones, by name."""

    slices: Mapping[str, Slice] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            ExportError: no such tensor, or its file is damaged.
        """
        part = self.slices.get(name)
        if part is None:
            return super().tensor(name)
        try:
            with safe_open(self.files[name], framework="pt") as file:
                whole: Tensor = file.get_slice(part.stack)[part.expert : part.expert + 1][0]
        except (SafetensorError, OSError) as error:
            msg = f"{self.files[name]}: tensor {part.stack} cannot be read: {error}"
            raise ExportError(msg) from error
        rows = whole[part.first :: part.step]
        return rows.reshape(self.facts[name].shape).contiguous()


def open_stacked(path: Path, parts: Parts) -> StackedCheckpoint:
    """Return a checkpoint with `quant_method` mxfp4.

    Raises:
        ExportError: stacks of other shapes than codes and scales of experts have.
    """
    assert parts.quantization is not None
    scheme = parse_mxfp4(parts.quantization).scheme
    turns = parts.config.get("model_type") in _TURNS
    slices: dict[str, Slice] = {}
    facts = dict(parts.facts)
    for key, fact in parts.facts.items():
        end = next((end for end in SUFFIXES if key.endswith(end)), None)
        if end is not None and ".experts." in key:
            del facts[key]
            for name, part, shape in _parts(key, end, fact, turns=turns):
                slices[name] = part
                facts[name] = TensorFact(shape, fact.dtype)
    files = {name: parts.files[slices[name].stack if name in slices else name] for name in facts}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in slices)
    quantized = {name: entry(name, scheme, LAYOUT, facts) for name in layers}
    return StackedCheckpoint(
        path, parts.config, parts.quantization, METHOD, files, facts, quantized, slices
    )


def _parts(
    key: str, end: str, fact: TensorFact, *, turns: bool
) -> Iterator[tuple[str, Slice, tuple[int, int]]]:
    """Yield (name, place, shape) of the tensors of single experts in a stack."""
    prefix, _, leaf = key.removesuffix(end).rpartition(".")
    wanted = 4 if SUFFIXES[end] == "weight_packed" else 3
    if len(fact.shape) != wanted:
        msg = f"{key} has shape {list(fact.shape)}, not {wanted} dimensions, experts first"
        raise ExportError(msg)
    count, rows, *inner = fact.shape
    names = JOINED.get(leaf, (leaf,)) if turns else (leaf,)
    if rows % len(names):
        msg = f"{key} has {rows} rows, which are no {len(names)} equal projections"
        raise ExportError(msg)
    shape = (rows // len(names), math.prod(inner))
    for expert in range(count):
        for first, name in enumerate(names):
            full = f"{prefix}.{expert}.{name}.{SUFFIXES[end]}"
            yield full, Slice(key, expert, first, len(names)), shape
