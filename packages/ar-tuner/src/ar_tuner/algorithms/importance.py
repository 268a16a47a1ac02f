"""How much each input channel of each layer matters: the mean square of what flows through it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.grouping import grouped, ungrouped
from ar_tuner.watching import watching

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from ar_schemes import TensorSpec
    from ar_tuner.algorithms.base import BlockTask, Target
    from ar_tuner.parts import WeightRef

ROWS = 32
"""Rows that tuning looks at; the mean square settles long before."""
NOTHING = 1e-30
"""A mean square up to this counts as zero."""
AVERAGED = 32
"""Elements over which a weight's own size is averaged, whatever the group (llama.cpp's rule)."""


class Energy:
    """Sums the squares of the input channels of layers, call by call."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, layers: Sequence[str], x: Tensor) -> None:
        """Take what layers were given, [..., I]."""
        flat = x.detach().float().reshape(-1, x.shape[-1])
        squares = flat.square().sum(0)
        for layer in layers:
            self._sums[layer] = self._sums.get(layer, 0.0) + squares
            self.tokens[layer] = self.tokens.get(layer, 0) + flat.shape[0]

    def means(self) -> dict[str, Tensor]:
        """Return the mean squares, float32 [I], of the layers that were given anything."""
        seen = {layer: count for layer, count in self.tokens.items() if count}
        return {layer: self._sums[layer] / count for layer, count in seen.items()}


@contextlib.contextmanager
def metered(block: nn.Module, targets: Sequence[Target]) -> Iterator[Energy]:
    """Yield the energy of the targets' inputs, summed over all calls while the context lasts."""
    energy = Energy()

    def watch(refs: Sequence[WeightRef], x: Tensor) -> None:
        energy.add([ref.layer for ref in refs], x)

    with watching(block, [t.ref for t in targets], watch):
        yield energy


def input_energy(task: BlockTask, *, rows: int = ROWS) -> dict[str, Tensor]:
    """Return the mean square of each layer's input channels, float32 [I], by layer name.

    A layer that no token reached (an expert) is missing.
    """
    assert task.inputs is not None
    with metered(task.block, task.targets) as energy, torch.no_grad():
        for chosen in task.inputs.chunks(rows, task.settings.batch_size):
            task.run({}, chosen)
    return energy.means()


def filled(energy: Tensor | None, weight: Tensor, spec: TensorSpec) -> Tensor:
    """Return importance without zeros: [I] as it is where it has none, else [O, I].

    In a group where more than half of the channels are zero (or where nothing was measured) the
    weight speaks for itself: its magnitude, from 4 bits on plus the root of its mean square.
    Fewer zeros become the mean of the group's other channels. These are the rules of auto-round.

    Args:
        energy: mean squares [I], or None where nothing was measured.
        weight: the weight [O, I].
        spec: how it will be represented.
    """
    if energy is None:
        energy = torch.zeros(weight.shape[-1], device=weight.device)
    zero = energy <= NOTHING
    if not zero.any():
        return energy
    shape = tuple(weight.shape)
    measured = grouped(energy.expand(shape), spec.granularity)
    empty = grouped(zero.expand(shape), spec.granularity)
    size = grouped(weight.detach().float(), spec.granularity).abs()
    if spec.bits > 3:  # noqa: PLR2004 - as documented
        size = size + (size.square().sum(-1, keepdim=True) / AVERAGED).sqrt()
    zeros = empty.sum(-1, keepdim=True)
    others = empty.shape[-1] - zeros
    mean = measured.sum(-1, keepdim=True) / others.clamp_min(1)
    out = torch.where(empty, mean.expand(measured.shape), measured)
    mostly = zeros > empty.shape[-1] // 2
    return ungrouped(torch.where(mostly, size, out), shape, spec.granularity)
