"""What a bit layout must be able to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from ar_kernels.weight import QuantizedWeight
    from ar_schemes import TensorSpec


@dataclass(frozen=True)
class TensorFact:
    """Shape and type of one packed tensor, known without data."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@runtime_checkable
class Layout(Protocol):
    """A bit order of one quantized weight [O, I] in a file."""

    @property
    def name(self) -> str:
        """Identifier, `gptq`, `awq`, ..."""

    def refuses(self, spec: TensorSpec, rows: int, columns: int) -> str | None:
        """Return why a weight cannot be packed so, or None."""

    def facts(self, spec: TensorSpec, rows: int, columns: int) -> dict[str, TensorFact]:
        """Return the packed tensors' shapes and types without data; keys are name suffixes."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the packed tensors by suffix (`qweight`, `scales`, ...)."""

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, rows: int, columns: int
    ) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`."""


@runtime_checkable
class HasOptional(Protocol):
    """A layout with tensors that a checkpoint may have or not: ranges of static activations."""

    @property
    def optional(self) -> Mapping[str, TensorFact]:
        """Shapes and types by suffix."""


def optional_of(layout: Layout) -> Mapping[str, TensorFact]:
    """Return the tensors that a layout may have beside those it needs."""
    return layout.optional if isinstance(layout, HasOptional) else {}
