"""Where quantized weights go: the protocol between the tuner and the formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerPlan


@dataclass(frozen=True)
class SinkRequest:
    """What a sink needs to know before the first weight arrives.

    Attributes:
        format: name of the format, `auto_round`.
        output: directory the checkpoint will be; absent or empty.
        source: directory of the float checkpoint, None for a model in memory.
        config: the model's configuration, plain JSON values.
        plan: what each layer gets; those that are kept as the source stores them have its scheme.
        blocks: prefixes of the block lists, `model.layers`.
        facts: tuning settings, written for information.
        max_shard_bytes: size above which a further weight file is begun.
        side: writes tokenizer and generation config of a model in memory into a folder.
        overwrite: replace an existing output directory.
    """

    format: str
    output: Path
    source: Path | None
    config: Mapping[str, Any]
    plan: LayerPlan
    blocks: tuple[str, ...]
    facts: Mapping[str, Any]
    max_shard_bytes: int = 5_000_000_000
    side: Callable[[Path], None] | None = None
    overwrite: bool = False


def parse_formats(text: str | Sequence[str]) -> tuple[str, ...]:
    """Return the formats in a comma-separated string or a list.

    Raises:
        TunerError: none, or one twice.
    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    out = tuple(p.strip() for p in parts if p.strip())
    if not out or len(set(out)) < len(out):
        msg = f"format {text!r} is not allowed: name at least one format, each once"
        raise TunerError(msg)
    return out


def folders(output: Path, formats: Sequence[str]) -> dict[str, Path]:
    """Return the directory of each format: the output itself, or one folder each inside it."""
    if len(formats) == 1:
        return {formats[0]: output}
    return {f: output / f.replace(":", "-").replace("_", "-") for f in formats}


class Sink(Protocol):
    """Receives weights as they become final and makes a checkpoint of them, whole or not at all."""

    def put(self, name: str, weight: QuantizedWeight) -> None:
        """Take the weight of a layer (name without `.weight`)."""

    def put_tensor(self, name: str, tensor: Tensor) -> None:
        """Take a tensor that stays as it is, with its full key."""

    def commit(self) -> Path:
        """Make the checkpoint visible under its name at once, and return its directory."""

    def abort(self) -> None:
        """Remove everything that was staged."""


class Sinks:
    """Several sinks that get the same weights: several formats of one run."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def put(self, name: str, weight: QuantizedWeight) -> None:
        """Give every sink the weight of a layer."""
        for sink in self._sinks:
            sink.put(name, weight)

    def put_tensor(self, name: str, tensor: Tensor) -> None:
        """Give every sink a tensor that stays as it is."""
        for sink in self._sinks:
            sink.put_tensor(name, tensor)

    def commit(self) -> list[Path]:
        """Make every checkpoint visible, each whole, and return their directories."""
        return [sink.commit() for sink in self._sinks]

    def abort(self) -> None:
        """Remove everything that was staged and is not visible yet."""
        for sink in self._sinks:
            sink.abort()
