"""What a decoder block was taken with, to run as one step, and whether that still holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ar_kernels.native.layer import Parts, Step

if TYPE_CHECKING:
    import torch

    from ar_kernels.native.watched import WatchedModules


class Made(dict[int, Step]):
    """Steps by their number of sequences; a copy of a block makes its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Made:
        return Made()

    def __reduce__(self) -> tuple[type[Made], tuple[()]]:
        return Made, ()


@dataclass(frozen=True)
class Taken:
    """What a block was taken with: its parts, where each was found, and steps made so far."""

    parts: Parts
    watched: WatchedModules
    steps: Made = field(default_factory=Made)

    def is_as_it_was(self) -> bool:
        """Tell whether nobody replaced one of the modules or hooked into it."""
        return self.watched.is_same()

    def step(self, rows: int, dtype: torch.dtype) -> Step:
        """Return the step for a number of sequences, made again where weights are others."""
        found = self.steps.get(rows)
        if found is None or found.dtype != dtype or not found.is_good():
            found = self.steps[rows] = Step(self.parts, rows, dtype)
        return found
