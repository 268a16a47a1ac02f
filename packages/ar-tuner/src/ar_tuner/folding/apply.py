"""What folding changes in a block, and the block changed so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from ar_tuner.algorithms.base import Target
    from ar_tuner.parts import WeightRef

_COLUMNS, _TENSORS = "columns|", "tensors|"


@dataclass(frozen=True)
class Folding:
    """A change of a block's float parameters that leaves what it computes as it is.

    Attributes:
        tensors: new values of gains and biases of norms, by parameter name in the block.
        columns: by the parameter name of a weight, the factor of each input channel, float32 [I].
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """True where anything changes."""
        return bool(self.columns)

    def joined(self, other: Folding) -> Folding:
        """Return both changes as one; they concern different parameters."""
        return Folding({**self.tensors, **other.tensors}, {**self.columns, **other.columns})

    def changed(self, block: nn.Module, ref: WeightRef) -> Tensor:
        """Return a weight of the block after the change, as stored."""
        stored = block.get_parameter(ref.parameter).detach()
        factor = self.columns.get(ref.parameter)
        if factor is None:
            return stored
        made = ref.view(stored).float() * factor.to(stored.device)
        return ref.view(made).to(stored.dtype).contiguous()

    def square(self, ref: WeightRef) -> Tensor | float:
        """Return the factor that the squares of a weight's inputs are divided by, [I] or 1."""
        factor = self.columns.get(ref.parameter)
        return 1.0 if factor is None else factor.square()

    def replaced(self, block: nn.Module, targets: tuple[Target, ...]) -> dict[str, Tensor]:
        """Return every parameter of the block that changes, by name, as stored."""
        weights = {
            t.ref.parameter: self.changed(block, t.ref)
            for t in targets
            if t.ref.parameter in self.columns
        }
        kept = {k: v.to(block.get_parameter(k).device) for k, v in self.tensors.items()}
        return {**weights, **kept}

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the change as named tensors, for the journal of a run."""
        return {
            **{_TENSORS + k: v for k, v in self.tensors.items()},
            **{_COLUMNS + k: v for k, v in self.columns.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Folding:
        """Return the change that `to_tensors()` gave."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        return cls(part(_TENSORS), part(_COLUMNS))


def apply(block: nn.Module, targets: tuple[Target, ...], folding: Folding) -> None:
    """Change the parameters of a block in place."""
    with torch.no_grad():
        for name, value in folding.replaced(block, targets).items():
            block.get_parameter(name).data = value
