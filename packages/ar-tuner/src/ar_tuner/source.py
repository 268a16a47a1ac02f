"""Where the floats come from: a checkpoint directory, stored as floats or in a quantized format.

A quantized checkpoint is a source like any other: it stands for the floats its codes mean. Its
reader comes through the hook `ar_open_source`, so every format that an installed package reads is
a source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open

from ar_tuner.names import source_files, source_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_schemes import Scheme

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@runtime_checkable
class Source(Protocol):
    """A checkpoint as floats; tensors are read when asked for.

    Names are those of the float checkpoint: packed codes and scales do not show.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""

    @property
    def dequantized(self) -> frozenset[str]:
        """Names of the tensors that come from codes: matrices [O, I]."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the floats, where the configuration names none."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of some tensors one at a time, in the order of the files."""


@runtime_checkable
class KeepsCodes(Protocol):
    """A source whose quantized layers can be had as they are stored, not as floats only."""

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """Name of each tensor that comes from codes (`....weight`) to the scheme it is stored in.

        A tile of a scheme may hang over the edge of its matrix.
        """

    def weight(self, name: str) -> QuantizedWeight:
        """Return the codes and scales of such a tensor, exactly those of the files."""


@dataclass(frozen=True)
class FloatSource:
    """A checkpoint of floats in safetensors files.

    Attributes:
        files: tensor name to file.
    """

    files: Mapping[str, Path]

    @classmethod
    def of(cls, directory: Path) -> FloatSource:
        """Return the source in a directory.

        Raises:
            TunerError: no safetensors file there, or an index that leads elsewhere.
        """
        return cls(source_files(directory))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self.files)

    @property
    def dequantized(self) -> frozenset[str]:
        """Names of the tensors that come from codes: none."""
        return frozenset()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first float tensor."""
        for name, path in self.files.items():
            with safe_open(path, framework="pt") as file:
                found = _FLOATS.get(file.get_slice(name).get_dtype())
                if found is not None:
                    return found
        return torch.float32

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        with safe_open(self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of some tensors one at a time, in the order of the files."""
        return source_tensors(self.files, names)


@dataclass(frozen=True)
class Turned:
    """A source some of whose matrices [O, I] are given as [I, O], as GPT-2's files keep them."""

    source: Source
    turned: frozenset[str]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return self.source.names

    @property
    def dequantized(self) -> frozenset[str]:
        """Names of the tensors that come from codes."""
        return self.source.dequantized

    @property
    def dtype(self) -> torch.dtype:
        """Type of the floats."""
        return self.source.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        shape = self.source.shape(name)
        return shape[::-1] if name in self.turned else shape

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of some tensors one at a time."""
        for name, tensor in self.source.read(names):
            yield name, tensor.t().contiguous() if name in self.turned else tensor


def stored_schemes(source: Source | None) -> Mapping[str, Scheme]:
    """Return the schemes that a source stores tensors in, by name; nothing where it cannot tell."""
    own = source.source if isinstance(source, Turned) else source
    return own.schemes if isinstance(own, KeepsCodes) else {}


def stored_weight(source: Source, name: str) -> QuantizedWeight:
    """Return a tensor that `stored_schemes` names, as it is stored: a matrix [O, I]."""
    own = source.source if isinstance(source, Turned) else source
    assert isinstance(own, KeepsCodes)
    return own.weight(name)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's configuration as that of its float checkpoint."""
    return {k: v for k, v in config.items() if k not in QUANTIZATION_KEYS}


QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Keys of config.json that say how weights are stored."""
