"""What a checkpoint format must be able to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ar_kernels.layouts.ragged import evened

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from ar_export.sink import SinkRequest
    from ar_kernels import QuantizedWeight
    from ar_kernels.layouts.base import TensorFact
    from ar_schemes import LayerPlan, Scheme, TensorSpec


class Request(Protocol):
    """What the tuner asks for (`ar_tuner.sink.SinkRequest`), as far as formats look at it."""

    @property
    def format(self) -> str:
        """The spelling the user typed."""

    @property
    def output(self) -> Path:
        """Directory of the checkpoint."""

    @property
    def source(self) -> Path | None:
        """Directory of the float checkpoint."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration."""

    @property
    def plan(self) -> LayerPlan:
        """What each layer gets."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """Prefixes of the block lists."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Tuning settings, for information."""


@dataclass(frozen=True)
class LayerEntry:
    """One quantized layer of a checkpoint: its scheme, shape [rows, columns] and bit order.

    A tile of the scheme may hang over the edge of the weight; `spec` is that of the
    `QuantizedWeight`, whose tiles are as large as divides both.
    """

    scheme: Scheme
    rows: int
    columns: int
    layout: str

    @property
    def spec(self) -> TensorSpec:
        """The weight as it is unpacked."""
        assert self.scheme.weight is not None
        return evened(self.scheme.weight, self.rows, self.columns)


@runtime_checkable
class Format(Protocol):
    """A checkpoint format on safetensors files. Stateless."""

    @property
    def name(self) -> str:
        """Identifier, `auto_round`."""

    @property
    def spellings(self) -> tuple[str, ...]:
        """Everything a user may type for it; the first is its name."""

    @property
    def summary(self) -> str:
        """One line: what reads it."""

    def refuses(self, spelling: str, scheme: Scheme, rows: int, columns: int) -> str | None:
        """Return why a layer [rows, columns] cannot be carried, or None."""

    def config(self, request: Request) -> dict[str, Any] | None:
        """Return the `quantization_config` to write, plain JSON values, or None for none.

        Asked for before any work, so it may also refuse the plan as a whole.

        Raises:
            ExportError: the plan cannot be written in this format.
        """

    def tensors(
        self, config: Mapping[str, Any] | None, weight: QuantizedWeight, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Return the tensors of a layer by suffix.

        Args:
            config: the `quantization_config` that `config` returned for this checkpoint.
            weight: the layer's weight [O, I].
            dtype: type of the float weights of the model.
        """

    def reads(self, config: Mapping[str, Any] | None) -> bool:
        """Tell whether a checkpoint with this `quantization_config` is of this format."""

    def layers(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorFact]
    ) -> dict[str, LayerEntry]:
        """Return the quantized layers of a checkpoint from its config and its tensors.

        Raises:
            ExportError: config and tensors contradict each other.
        """

    def suffixes(self, entry: LayerEntry) -> Collection[str]:
        """Return the tensor suffixes of a quantized layer."""


@runtime_checkable
class ImpliesScheme(Protocol):
    """A format whose spellings name presets."""

    def scheme_for(self, spelling: str) -> str | None:
        """Return the preset that a spelling implies when the user names no scheme, or None."""


@runtime_checkable
class AdjustsPlan(Protocol):
    """A format that decides what some layers get."""

    def adjust(self, spelling: str, plan: LayerPlan, config: Mapping[str, Any]) -> LayerPlan:
        """Return the plan with other schemes for some layers; rules of the user stay.

        Raises:
            ExportError: the format cannot hold such a model.
        """


@runtime_checkable
class HoldsEmbeddings(Protocol):
    """A format that can hold quantized embeddings."""

    @property
    def embeddings(self) -> str:
        """Say how, in one line."""


@runtime_checkable
class SizesFloats(Protocol):
    """A format that stores what stays a float in other types than the model has it in."""

    def float_bytes(
        self, config: Mapping[str, Any], floats: Mapping[str, tuple[tuple[int, ...], str]]
    ) -> int:
        """Return the bytes of float tensors (shape and type by name) and of the file's header."""


@runtime_checkable
class SetsDtype(Protocol):
    """A format whose readers compute in one float type, which config.json then names."""

    @property
    def dtype(self) -> str:
        """The type, `float16`."""


@runtime_checkable
class NamesConfigs(Protocol):
    """A format whose readers look for the quantization config in files of their own."""

    @property
    def config_names(self) -> tuple[str, ...]:
        """Names of the files, beside quantization_config.json."""


@runtime_checkable
class AddsToConfig(Protocol):
    """A format whose readers look for the quantization under another key of config.json."""

    def beside(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return further keys of config.json for a `quantization_config`."""


@runtime_checkable
class Container(Protocol):
    """A format with files of its own instead of safetensors."""

    def open_sink(self, request: SinkRequest) -> Sink:
        """Return the sink that writes a checkpoint.

        Raises:
            ExportError: the model cannot be written so.
        """

    def holds(self, path: Path) -> bool:
        """Tell whether a path is a checkpoint of this format."""

    def open(self, path: Path) -> Readable:
        """Return the checkpoint at a path."""


class Sink(Protocol):
    """What the tuner writes to."""

    def put(self, name: str, weight: QuantizedWeight) -> None:
        """Take the weight of a layer (name without `.weight`)."""

    def put_tensor(self, name: str, tensor: Tensor) -> None:
        """Take a tensor that stays as it is."""

    def commit(self) -> Path:
        """Make the checkpoint visible at once, and return its directory."""

    def abort(self) -> None:
        """Remove everything that was staged."""


class Readable(Protocol):
    """A checkpoint on disk, as `ar_export.reader.Checkpoint` is one."""

    @property
    def path(self) -> Path:
        """Its directory."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration."""

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        """None where files describe themselves."""

    @property
    def format(self) -> str:
        """Name of the format."""

    @property
    def facts(self) -> Mapping[str, TensorFact]:
        """Tensor name to shape and type."""

    @property
    def files(self) -> Mapping[str, Path]:
        """Tensor name to file."""

    @property
    def quantized(self) -> Mapping[str, LayerEntry]:
        """Layer name to how it is stored."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape."""

    @property
    def total_bytes(self) -> int:
        """Size of the weight files."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor."""

    def weight(self, layer: str) -> QuantizedWeight:
        """Return the quantized weight of a layer."""
