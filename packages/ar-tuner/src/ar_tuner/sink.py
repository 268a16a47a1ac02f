"""Where quantized weights go: the protocol between the tuner and the formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
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
        plan: what each layer gets.
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
