"""What a backend must be able to do, and what a layer needs of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from ar_schemes import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from ar_kernels.weight import QuantizedWeight


@dataclass(frozen=True)
class Need:
    """What one layer asks of a backend.

    `device` is a torch device type (`cpu`, `cuda`, ...); `dtype` that of the activations.
    """

    spec: TensorSpec
    rows: int
    columns: int
    device: str
    dtype: torch.dtype
    activation: TensorSpec | None = None


@dataclass(frozen=True)
class PackedWeight:
    """A weight in a backend's own order: what its op takes.

    `meta` are plain integers (shapes, widths) that the op needs beside the buffers.
    """

    buffers: dict[str, Tensor]
    meta: tuple[int, ...] = field(default=())


@runtime_checkable
class Backend(Protocol):
    """A family of kernels on one kind of device."""

    @property
    def name(self) -> str:
        """Identifier, `dense`, `cpu_native`, ..."""

    @property
    def priority(self) -> int:
        """Static rank; the highest usable one is chosen."""

    @property
    def status(self) -> str:
        """How far it was tried: `verified ...`, `contract-tested` or `experimental`."""

    def missing(self) -> str | None:
        """Return what this machine lacks for it, or None. Must not import heavy modules."""

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return the weight in the backend's order."""

    def unpack(self, packed: PackedWeight, need: Need) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`."""

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
