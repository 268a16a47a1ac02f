"""By what to scale the input channels of layers whose activations share powers of two.

Two things cost there. A channel that carries much has its whole group rounded coarsely, so even
channels lose less. And where between two powers of two the largest of a group usually lies decides
how coarse its steps are, and whether it is clamped: a factor for the whole group moves that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels import data_type
from ar_kernels.numerics.halves import fake_quant_alike
from ar_kernels.numerics.mx import Microscaling
from ar_tuner.algorithms.second_order.tracing import trace
from ar_tuner.folding.scales import candidates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_schemes import Scheme, TensorSpec
    from ar_tuner.algorithms.base import BlockTask, Target

POWERS = (0.5,)
"""Of the root mean square of a channel, and of that over the one of its weights."""
PHASES = 8
"""Factors that are tried for a group, from 1 up to the next power of two."""
GAIN = 0.003
"""Relative fall of the error below which nothing is scaled."""
ROWS, TOKENS = 32, 4096
"""Most rows and tokens that factors are tried on."""


@dataclass(frozen=True)
class Given:
    """What layers that share their input have to do with it.

    Attributes:
        x: some of it, float32 [T, I].
        weights: of the layers, float32 [O, I].
        specs: what each becomes.
        activation: what x becomes.
    """

    x: Tensor
    weights: tuple[Tensor, ...]
    specs: tuple[TensorSpec, ...]
    activation: TensorSpec

    @functools.cached_property
    def energies(self) -> tuple[Tensor, Tensor]:
        """Return the mean square of each channel, and the sum of those of its weights, [I]."""
        return self.x.square().mean(0), torch.cat(self.weights).square().sum(0)

    @property
    def groups(self) -> int:
        """Groups of channels that share a power of two."""
        return self.activation.granularity.scale_shape(1, self.x.shape[1])[1]

    def lost(self, factor: Tensor) -> Tensor:
        """Return by what outputs err when x is divided by a factor [I] and quantized, [I].

        The mean square of each channel's error times the squares of its weights: what it comes to
        as far as errors of channels are independent.
        """
        made = fake_quant_alike((self.x / factor).contiguous(), self.activation) * factor
        return (made - self.x).square().mean(0) * self.energies[1]

    def rounded(self, factor: Tensor) -> Tensor:
        """Return the same of weights times a factor [I], searched and rounded to nearest, [I]."""
        energy = self.energies[0] / factor.square()
        total = torch.zeros_like(energy)
        for weight, spec in zip(self.weights, self.specs, strict=True):
            kind, goal = data_type(spec.data_type), (weight * factor).contiguous()
            made = kind.fake_quant(goal, spec, kind.search(goal, spec, importance=energy))
            total += (made - goal).square().sum(0) * energy
        return total


def is_evened(scheme: Scheme) -> bool:
    """Tell whether a layer's activations share powers of two."""
    spec = scheme.activation
    return spec is not None and isinstance(data_type(spec.data_type), Microscaling)


def evened(
    task: BlockTask, targets: Sequence[Target], *, alike: Tensor | None = None
) -> Tensor | None:
    """Return the factor of each input channel [I] under which layers err least; None: none gains.

    Counted are the errors of activations and of weights rounded to nearest. Weights are multiplied
    by the factor, what they are given is divided by it.

    Args:
        task: the block; its schemes may be without activations.
        targets: layers that share their input, with their schemes.
        alike: a number for each channel, int64 [I]; those of the same number get one factor.
    """
    given = _given(task, targets)
    if given is None:
        return None
    alike = None if alike is None else alike.to(given.x.device)
    one = torch.ones_like(given.x[0])
    plain = least = float((given.lost(one) + given.rounded(one)).sum())
    best: Tensor | None = None
    for base in (one, *candidates(given.weights, given.energies[0], alike=alike, powers=POWERS)):
        factor = phased(given, base, alike)
        found = float((given.lost(factor) + given.rounded(factor)).sum())
        if found < least:
            best, least = factor, found
    return best if least <= (1 - GAIN) * plain else None


def phased(given: Given, factor: Tensor, alike: Tensor | None = None) -> Tensor:
    """Return a factor [I] times a part of two for each group, the one that loses least."""
    size = len(factor) // given.groups
    ties = _ties(alike, given.groups).to(factor.device)
    parts = 2.0 ** -(torch.arange(PHASES, device=factor.device) / PHASES)
    errors = torch.stack(
        [given.lost(factor * part).view(given.groups, size).sum(1) for part in parts]
    )
    tied = errors.new_zeros(PHASES, int(ties.max()) + 1).index_add_(1, ties, errors)
    return factor * parts[tied.argmin(0)[ties]].repeat_interleave(size)


def _ties(alike: Tensor | None, groups: int) -> Tensor:
    """Return a number for each group of channels; those of one number have one factor.

    Groups tie that follow the very same rows; where they overlap otherwise, all tie.
    """
    if alike is None:
        return torch.arange(groups)
    rows = alike.view(groups, -1).sort(1).values
    found, which = torch.unique(rows, dim=0, return_inverse=True)
    apart = sum(len(row.unique()) for row in found) == len(alike.unique())
    return which if apart else torch.zeros_like(which)


def _given(task: BlockTask, targets: Sequence[Target]) -> Given | None:
    """Return some of what layers are given in the float block; None where no token comes."""
    assert task.inputs is not None
    chunks = task.inputs.chunks(ROWS, task.settings.batch_size)
    seen = [trace(task, targets[0], rows, weights={}) for rows in chunks]
    parts = [s.given for s in seen if s is not None and len(s.given)]
    if not parts:
        return None
    share = max(1, TOKENS // len(parts))
    x = torch.cat([p[:: -(-len(p) // share)] for p in parts])
    activation = targets[0].scheme.activation
    assert activation is not None
    weights = tuple(task.weight(t).float() for t in targets)
    specs = tuple(t.scheme.weight for t in targets if t.scheme.weight is not None)
    return Given(x, weights, specs, activation)
