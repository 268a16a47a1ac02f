"""A quantized checkpoint as the floats its codes stand for, for whoever quantizes it anew.

Found by ar-tuner through its hook `ar_open_source`; neither package imports the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ar_export.errors import ExportError
from ar_export.formats.dtypes import config_dtype, names_dtype
from ar_export.reader import assemble, read_parts
from ar_schemes import describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import torch
    from torch import Tensor

    from ar_export.reader import Checkpoint
    from ar_kernels import QuantizedWeight
    from ar_schemes import Scheme


def open_source(path: Path) -> DequantizedSource:
    """Return a quantized checkpoint as floats.

    Raises:
        ExportError: no format of ours, damaged, or without a quantized layer.
    """
    parts = read_parts(path)
    if parts.quantization is None:
        msg = f"{path} is not quantized"
        raise ExportError(msg)
    found = assemble(path, parts)
    if not found.quantized:
        msg = f"{path}: the config names a quantization, but no layer is quantized"
        raise ExportError(msg)
    return DequantizedSource(found)


class DequantizedSource:
    """The tensors of a checkpoint, quantized layers dequantized, scales and the like left out.

    Every name and type is that of the float checkpoint. Dequantized weights are [O, I], in the
    float type that the configuration names. What they are made of can be had, too.
    """

    def __init__(self, found: Checkpoint) -> None:
        self._found = found
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
        """Names of the tensors that come from codes, and how those are stored."""
        entries = ((name, self._found.quantized[layer]) for name, layer in self._layers.items())
        return {name: replace(e.scheme, name=describe(e.scheme)) for name, e in entries}

    def weight(self, name: str) -> QuantizedWeight:
        """Return the codes and scales of a tensor that comes from codes, as the files hold them."""
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
        return entry.rows, entry.columns

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of some tensors, one at a time."""
        for name in names:
            if name in self._layers:
                yield name, self.weight(name).dequantize(self.dtype)
            else:
                yield name, self._found.tensor(name)


def _is_dense(name: str, found: Checkpoint) -> bool:
    layer, _, suffix = name.rpartition(".")
    return layer not in found.quantized or suffix == "bias"
