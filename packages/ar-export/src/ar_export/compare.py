"""What differs between two checkpoints, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_export.reader import open_checkpoint
from ar_kernels import equal

if TYPE_CHECKING:
    from pathlib import Path

    from ar_export.formats.base import Readable


@dataclass(frozen=True)
class Difference:
    """One layer or tensor that differs: how, and the largest difference of its values."""

    name: str
    what: str
    largest: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints side by side."""

    layers: int
    tensors: int
    differences: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        """True when both hold the same weights to the bit."""
        return not self.differences


def compare_checkpoints(first: Path, second: Path) -> Comparison:
    """Return what differs between two checkpoints, whatever their formats.

    Raises:
        ExportError: one of them cannot be read.
    """
    a, b = open_checkpoint(first), open_checkpoint(second)
    out: list[Difference] = []
    layers = sorted(a.quantized.keys() | b.quantized.keys())
    for name in layers:
        out += _layer(a, b, name)
    ours, theirs = _floats(a), _floats(b)
    both = (ours | theirs) - {f"{name}.weight" for name in layers}
    for name in sorted(both):
        if name not in ours or name not in theirs:
            out.append(Difference(name, f"only in {first if name in ours else second}"))
            continue
        x, y = a.tensor(name), b.tensor(name)
        if x.shape != y.shape:
            out.append(Difference(name, f"shape {list(x.shape)} and {list(y.shape)}"))
        elif not torch.equal(x.double(), y.double()):
            gap = float((x.double() - y.double()).abs().max())
            out.append(Difference(name, "values differ", gap))
    return Comparison(len(layers), len(both), tuple(out))


def _floats(found: Readable) -> set[str]:
    """Return the tensors of a checkpoint that do not make up a quantized layer."""
    return {
        key
        for key in found.names
        if key.rpartition(".")[0] not in found.quantized or key.endswith(".bias")
    }


def _layer(a: Readable, b: Readable, name: str) -> list[Difference]:
    key = f"{name}.weight"
    if name not in a.quantized or name not in b.quantized:
        floats, coded = (b, a) if name in a.quantized else (a, b)
        if key not in floats.files:
            return [Difference(name, f"only in {coded.path}")]
        off = (floats.tensor(key).float() - coded.weight(name).dequantize()).abs().max()
        return [Difference(name, f"quantized in {coded.path} only", float(off))]
    x, y = a.weight(name), b.weight(name)
    if equal(x, y):
        return []
    if x.shape != y.shape:
        return [Difference(name, f"shape {list(x.shape)} and {list(y.shape)}")]
    gap = float((x.dequantize() - y.dequantize()).abs().max())
    if x.spec != y.spec:
        if gap == 0:
            return []  # the same numbers, said in another way
        return [Difference(name, f"{x.spec} and {y.spec}", gap)]
    parts = [k for k, v in x.tensors().items() if not _same(v, y.tensors().get(k))]
    return [Difference(name, f"{', '.join(parts)} differ", gap)]


def _same(x: torch.Tensor, y: torch.Tensor | None) -> bool:
    return y is not None and x.shape == y.shape and torch.equal(x.float(), y.float())
