"""What folding changes in a block, and the block changed so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ar_tuner.parts import assembled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from ar_tuner.algorithms.base import Target
    from ar_tuner.parts import WeightRef

_COLUMNS, _ROWS, _TENSORS = "columns|", "rows|", "tensors|"


@dataclass(frozen=True)
class Folding:
    """A change of a block's float parameters that leaves what it computes as it is.

    Attributes:
        tensors: new values of gains and biases, by parameter name in the block.
        columns: by layer, the factor of each input channel of its weight, float32 [I].
        rows: by layer, the factor of each output channel of its weight, float32 [O].
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """True where anything changes."""
        return bool(self.columns)

    def joined(self, other: Folding) -> Folding:
        """Return both changes as one; they concern different channels."""
        return Folding(
            {**self.tensors, **other.tensors},
            {**self.columns, **other.columns},
            {**self.rows, **other.rows},
        )

    def changed(self, block: nn.Module, ref: WeightRef) -> Tensor:
        """Return a weight of the block after the change, [O, I] in its own type."""
        stored = ref.view(block.get_parameter(ref.parameter).detach())
        columns, rows = self.columns.get(ref.layer), self.rows.get(ref.layer)
        made = stored.float()
        if columns is not None:
            made = made * columns.to(made.device)
        if rows is not None:
            made = made * rows.to(made.device).unsqueeze(-1)
        return made.to(stored.dtype)

    def square(self, ref: WeightRef) -> Tensor | float:
        """Return the factor that the squares of a weight's inputs are divided by, [I] or 1."""
        factor = self.columns.get(ref.layer)
        return 1.0 if factor is None else factor.square()

    def replaced(self, block: nn.Module, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Return every parameter of the block that changes, by name, as stored."""
        refs = [t.ref for t in targets if t.ref.layer in {*self.columns, *self.rows}]
        weights = assembled(((r, self.changed(block, r)) for r in refs), block.get_parameter)
        kept = {k: v.to(block.get_parameter(k).device) for k, v in self.tensors.items()}
        return {**{k: v.contiguous() for k, v in weights.items()}, **kept}

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the change as named tensors, for the journal of a run."""
        return {
            **{_TENSORS + k: v for k, v in self.tensors.items()},
            **{_COLUMNS + k: v for k, v in self.columns.items()},
            **{_ROWS + k: v for k, v in self.rows.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Folding:
        """Return the change that `to_tensors()` gave."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        return cls(part(_TENSORS), part(_COLUMNS), part(_ROWS))


def apply(block: nn.Module, targets: tuple[Target, ...], folding: Folding) -> None:
    """Change the parameters of a block in place."""
    with torch.no_grad():
        for name, value in folding.replaced(block, targets).items():
            block.get_parameter(name).data = value
