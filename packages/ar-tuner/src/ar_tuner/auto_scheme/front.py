"""What was chosen, what else there was, and both as files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ar_schemes import SOURCE, schemes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ar_schemes import LayerPlan, Scheme


@dataclass(frozen=True)
class FrontPoint:
    """One plan of the Pareto front: average bits, bytes of the weight files, predicted loss."""

    bits: float
    bytes: int
    loss: float
    layers: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "bits": self.bits,
            "bytes": self.bytes,
            "predicted_loss": self.loss,
            "layers": dict(self.layers),
        }


@dataclass(frozen=True)
class Choice:
    """The plan that was chosen for one target.

    Attributes:
        target: the average bits or the bytes asked for.
        picks: option name by free layer.
        bits: average bits per weight, counted as the target is.
        bytes: size of the weight files.
        loss: predicted divergence, nats per token.
        front: the plans of least predicted loss for their size, smallest first.
    """

    target: float
    picks: Mapping[str, str]
    bits: float
    bytes: int
    loss: float
    front: tuple[FrontPoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "target": self.target,
            "bits": self.bits,
            "bytes": self.bytes,
            "predicted_loss": self.loss,
            "layers": dict(self.picks),
            "front": [p.to_dict() for p in self.front],
        }


def plan_file(plan: LayerPlan) -> dict[str, Any]:
    """Return a plan as a `layer_config`: every layer of the blocks and those quantized outside."""
    return {
        row.layer.name: SOURCE.name if row.kept else _spelled(row.scheme)
        for row in plan.rows
        if row.layer.block is not None or row.quantized or row.kept
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _spelled(which: Scheme) -> str | dict[str, Any]:
    """Return a scheme as users write it: the name of a preset, or its numbers."""
    if which.weight is None:
        return "BF16"
    preset = schemes().get(which.name)
    if preset is not None and preset.to_dict() == which.to_dict():
        return which.name
    return {"act_bits": 16, **which.to_dict()}
