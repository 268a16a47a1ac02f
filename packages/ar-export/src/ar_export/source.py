"""A quantized checkpoint as the floats its codes stand for, for whoever quantizes it anew.

Found by ar-tuner through its hook `ar_open_source`; neither package imports the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ar_export.errors import ExportError
from ar_export.formats.dtypes import config_dtype, names_dtype
from ar_export.reader import Checkpoint, assemble, read_parts
from ar_schemes import describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_kernels.layouts.base import TensorFact
    from ar_schemes import Scheme

_KNOWN = (128, 128)
"""Tiles whose cut ones have layouts of their own (`ar_kernels.layouts.ragged`)."""
_SCALES = ("weight_scale_inv", "weight_scale")


def open_source(path: Path) -> DequantizedSource:
    """Return a quantized checkpoint as floats.

    Raises:
        ExportError: no format of ours, damaged, or without a quantized layer.
    """
    parts = read_parts(path)
    if parts.quantization is None:
        msg = f"{path} is not quantized"
        raise ExportError(msg)
    cut = _cut_tiles(parts.facts, _tile(parts.quantization))
    whole = {name: replace(parts.facts[name], shape=shape) for name, (_, shape) in cut.items()}
    parts = replace(parts, facts={**parts.facts, **whole})
    cropped = {name: shape for name, (shape, _) in cut.items()}
    found = assemble(path, parts, WholeTiles, cropped=cropped)
    assert isinstance(found, WholeTiles)
    if not found.quantized:
        msg = f"{path}: the config names a quantization, but no layer is quantized"
        raise ExportError(msg)
    return DequantizedSource(found)


@dataclass(frozen=True)
class WholeTiles(Checkpoint):
    """A checkpoint whose matrices are filled up with zeros to whole tiles.

    For tiles of another size than the layouts of cut tiles know (128 x 128). What the filling
    stands for is cut off again after dequantizing.

    Attributes:
        cropped: shape in the file, by tensor name.
    """

    cropped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, filled up.

        Raises:
            ExportError: no such tensor, or its file is damaged.
        """
        stored = super().tensor(name)
        if name not in self.cropped:
            return stored
        rows, columns = stored.shape
        out = torch.zeros(self.facts[name].shape, dtype=torch.uint8)
        out[:rows, :columns] = stored.view(torch.uint8)
        return out.view(stored.dtype)


class DequantizedSource:
    """The tensors of a checkpoint, quantized layers dequantized, scales and the like left out.

    Every name and type is that of the float checkpoint. Dequantized weights are [O, I], in the
    float type that the configuration names. What they are made of can be had, too.
    """

    def __init__(self, found: WholeTiles) -> None:
        self._found = found
        self._cropped = found.cropped
        self._layers = {f"{layer}.weight": layer for layer in found.quantized}
        self._dense = tuple(name for name in found.names if _is_dense(name, found))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors: quantized layers first."""
        return (*self._layers, *self._dense)

    @property
    def dequantized(self) -> frozenset[str]:
        """Names of the tensors that come from codes."""
        return frozenset(self._layers)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Names of the tensors that come from codes, and how those are stored.

        Those that were filled up are left out: as they are then, no file holds them.
        """
        own = {name: layer for name, layer in self._layers.items() if name not in self._cropped}
        entries = ((name, self._found.quantized[layer]) for name, layer in own.items())
        return {name: replace(e.scheme, name=describe(e.scheme)) for name, e in entries}

    def weight(self, name: str) -> QuantizedWeight:
        """Return the codes and scales of a tensor in `schemes`, as the files hold them."""
        return self._found.weight(self._layers[name])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the floats: as configured, else that of the first tensor that is not packed."""
        if names_dtype(self._found.config):
            return config_dtype(self._found.config)
        types = (self._found.facts[name].dtype for name in self._dense)
        plain = (t for t in types if t.is_floating_point and t.itemsize > 1)
        return next(plain, config_dtype(self._found.config))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        layer = self._layers.get(name)
        if layer is None:
            return self._found.shapes[name]
        entry = self._found.quantized[layer]
        return self._found.cropped.get(name, (entry.rows, entry.columns))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of some tensors, one at a time."""
        for name in names:
            layer = self._layers.get(name)
            if layer is None:
                yield name, self._found.tensor(name)
                continue
            weight = self._found.weight(layer).dequantize(self.dtype)
            if name in self._found.cropped:
                rows, columns = self._found.cropped[name]
                weight = weight[:rows, :columns].contiguous()
            yield name, weight


def _is_dense(name: str, found: Checkpoint) -> bool:
    layer, _, suffix = name.rpartition(".")
    return layer not in found.quantized or suffix == "bias"


def _tile(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the size of the tiles that a config names, or None."""
    groups = quantization.get("config_groups")
    weights = [g.get("weights") for g in (groups or {}).values() if isinstance(g, dict)]
    sizes = [quantization.get("weight_block_size")]
    sizes += [w.get("block_structure") for w in weights if isinstance(w, dict)]
    for size in sizes:
        if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size):  # noqa: PLR2004
            return size[0], size[1]
    return None


def _cut_tiles(
    facts: Mapping[str, TensorFact], tile: tuple[int, int] | None
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (shape, shape in whole tiles) of the FP8 matrices whose last tiles are cut."""
    out: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name, fact in facts.items():
        layer, _, suffix = name.rpartition(".")
        if tile is None or tile == _KNOWN:
            break
        if suffix != "weight" or fact.dtype != torch.float8_e4m3fn:
            continue
        scales = (facts.get(f"{layer}.{s}") for s in _SCALES)
        scale = next((s for s in scales if s is not None), None)
        wanted = tuple(-(-n // t) for n, t in zip(fact.shape, tile, strict=False))
        if scale is None or len(fact.shape) != 2 or scale.shape != wanted:  # noqa: PLR2004
            continue
        whole = (wanted[0] * tile[0], wanted[1] * tile[1])
        if whole != fact.shape:
            out[name] = (fact.shape, whole)
    return out
