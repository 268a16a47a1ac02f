"""`PlanSize`: what a plan takes in the files of one format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class PlanSize:
    """Bytes of a plan in the weight files of one format.

    Attributes:
        layers: bytes of the tensors of each quantized layer, by name: codes, scales, zero points
            and padding.
        rest: bytes of everything else: tensors that stay floats, and the files' own headers.
        refused: why a quantized layer cannot be carried, by name; it is in no sum.
    """

    layers: Mapping[str, int]
    rest: int
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of the weight files."""
        return sum(self.layers.values()) + self.rest
