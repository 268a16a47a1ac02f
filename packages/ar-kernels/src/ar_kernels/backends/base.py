"""What a backend must be able to do, and what a layer needs of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from ar_kernels.weight import QuantizedWeight
    from ar_schemes import TensorSpec


@dataclass(frozen=True)
class Need:
    """What one layer asks of a backend.

    Attributes:
        spec: how the weight is represented.
        rows: O, output features.
        columns: I, input features.
        device: torch device type, `cpu`, `cuda`, ...
        dtype: type of the activations.
        activation: how the activations are quantized, None when they stay as they are.
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

    Attributes:
        buffers: tensors by name; their order is that of `Backend.buffer_names(meta)`.
        meta: plain integers (shapes, widths) that the op needs beside the buffers.
    """

    buffers: dict[str, Tensor]
    meta: tuple[int, ...] = field(default=())


@runtime_checkable
class Backend(Protocol):
    """A family of kernels on one kind of device. Stateless."""

    @property
    def name(self) -> str:
        """Identifier, `dense`, `cpu_native`, ..."""

    @property
    def priority(self) -> int:
        """Static rank; the highest usable one is chosen."""

    @property
    def status(self) -> str:
        """How far it was tried: `verified ...`, `contract-tested ...` or `experimental ...`."""

    @property
    def keeps_codes(self) -> bool:
        """Tell whether the packed weight still holds the codes; then it is an `ExactBackend`.

        A layer keeps the checkpoint's own tensors beside a backend that does not.
        """

    def missing(self) -> str | None:
        """Return what this machine lacks for it, or None. Must not import heavy modules."""

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return the weight in the backend's order."""

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:
        """Return the names of the buffers of a packed weight with this `meta`, in order."""

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x.

        Must return a new tensor, never a view of `x` or of a buffer.
        """


@runtime_checkable
class ExactBackend(Backend, Protocol):
    """A backend whose packed weight can be turned back."""

    def unpack(self, packed: PackedWeight, need: Need) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`."""


@runtime_checkable
class BoundProduct(Protocol):
    """The product with one packed weight, its arguments prepared. A copy of it is None."""

    def __call__(self, x: Tensor, buffers: Mapping[str, Tensor | None]) -> Tensor | None:
        """Return what `Backend.linear` returns without a bias.

        None where this is not for it: x is of another type, recorded or differentiated, or
        `buffers` does not hold the weight any more.
        """


@runtime_checkable
class BindingBackend(Backend, Protocol):
    """A backend whose calls cost less where most of their work is done once. Optional."""

    def bind(
        self, buffers: Mapping[str, Tensor], meta: tuple[int, ...], dtype: torch.dtype
    ) -> BoundProduct | None:
        """Return the product with a packed weight, None where there is nothing to gain.

        Args:
            buffers: of the packed weight in the order of `buffer_names`, by the layer's names.
            meta: of the packed weight.
            dtype: of the activations.
        """
