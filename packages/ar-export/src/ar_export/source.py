"""A quantized checkpoint as the floats its codes stand for, for whoever quantizes it anew.

Found by ar-tuner through its hook `ar_open_source`; neither package imports the other.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ar_export.errors import ExportError
from ar_export.formats.dtypes import config_dtype
from ar_export.opening import names_dtype, turned_layers
from ar_export.reader import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import torch
    from torch import Tensor

    from ar_export.formats.base import Readable


def open_source(path: Path) -> DequantizedSource:
    """Return a quantized checkpoint as floats.

    Raises:
        ExportError: no format of ours, damaged, or without a quantized layer.
    """
    found = open_checkpoint(path)
    if not found.quantized:
        msg = f"{path}: the config names a quantization, but no layer is quantized"
        raise ExportError(msg)
    return DequantizedSource(found)


class DequantizedSource:
    """The tensors of a checkpoint, quantized layers dequantized, scales and the like left out.

    Every name, shape, type and orientation is that of the float checkpoint. Dequantized weights
    have the float type that the configuration names.
    """

    def __init__(self, found: Readable) -> None:
        self._found = found
        self._layers = {f"{layer}.weight": layer for layer in found.quantized}
        self._dense = tuple(name for name in found.names if _is_dense(name, found))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors: quantized layers first."""
        return (*self._layers, *self._dense)

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
        turned = layer in self._turned
        return (entry.columns, entry.rows) if turned else (entry.rows, entry.columns)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of some tensors, one at a time."""
        for name in names:
            layer = self._layers.get(name)
            if layer is None:
                yield name, self._found.tensor(name)
                continue
            weight = self._found.weight(layer).dequantize(self.dtype)
            yield name, weight.t().contiguous() if layer in self._turned else weight

    @functools.cached_property
    def _turned(self) -> frozenset[str]:
        return turned_layers(self._found)


def _is_dense(name: str, found: Readable) -> bool:
    layer, _, suffix = name.rpartition(".")
    return layer not in found.quantized or suffix == "bias"
