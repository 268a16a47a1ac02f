"""By what to scale the input channels of layers: a small grid, judged by the error of rounding.

A channel that carries much, or whose weights are small beside those it shares a scale with, loses
more by rounding than others. Weights scaled up there are rounded more finely; what a layer is
given is divided by the same (AWQ, arXiv 2306.00978).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels import data_type

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from ar_schemes import TensorSpec

POWERS = (0.125, 0.25, 0.375, 0.5, 0.625)
"""Of the root mean square of a channel, and of that over the one of its weights."""
REACH = 16.0
"""Largest factor, and the inverse of the smallest."""
GAIN = 0.02
"""Relative fall of the error below which nothing is scaled."""
_DEAD = 1e-3
_DAMPING = 0.01


def chosen(
    weights: Sequence[Tensor],
    specs: Sequence[TensorSpec],
    gram: Tensor,
    *,
    alike: Tensor | None = None,
) -> Tensor | None:
    """Return the factor of each channel [I] under which rounding loses least; None: none gains.

    Args:
        weights: of layers that share their input, float32 [O, I].
        specs: what each becomes.
        gram: mean of x x^T of the input, [I, I].
        alike: a number for each channel, int64 [I]; those of the same number get one factor.
            None: each has its own.
    """
    plain = least = rounding_error(weights, specs, gram, torch.ones_like(gram.diagonal()))
    best: Tensor | None = None
    for factor in candidates(weights, gram.diagonal(), alike=alike):
        error = rounding_error(weights, specs, gram, factor)
        if error < least:
            best, least = factor, error
    return best if least <= (1 - GAIN) * plain else None


def candidates(
    weights: Sequence[Tensor],
    energy: Tensor,
    *,
    alike: Tensor | None = None,
    powers: Sequence[float] = POWERS,
) -> Iterator[Tensor]:
    """Yield factors [I] for inputs of a mean square `energy` [I]; their geometric mean is 1."""
    given = _floored(_shared(energy, alike).sqrt())
    held = _floored(_shared(torch.cat(list(weights)).square().mean(0), alike).sqrt())
    for base in (given, given / held):
        for power in powers:
            factor = base**power
            yield (factor / factor.log().mean().exp()).clamp(1 / REACH, REACH)


def _shared(size: Tensor, alike: Tensor | None) -> Tensor:
    """Return the mean over channels of the same number, for each channel."""
    if alike is None:
        return size
    index = alike.to(size.device)
    sums = size.new_zeros(int(index.max()) + 1, 2)
    sums.index_add_(0, index, torch.stack([size, torch.ones_like(size)], -1))
    return sums[index, 0] / sums[index, 1]


def rounding_error(
    weights: Sequence[Tensor], specs: Sequence[TensorSpec], gram: Tensor, factor: Tensor
) -> float:
    """Return trace(E H E^T), E the error of weights scaled by a factor [I], searched and rounded.

    In units of the outputs: the inputs are divided by the factor, so H is too.
    """
    scaled = gram / factor / factor.unsqueeze(-1)
    energy = scaled.diagonal() + _DAMPING * scaled.diagonal().mean()
    total = 0.0
    for weight, spec in zip(weights, specs, strict=True):
        kind, goal = data_type(spec.data_type), (weight * factor).contiguous()
        made = kind.fake_quant(goal, spec, kind.search(goal, spec, importance=energy))
        error = made - goal
        total += float(((error @ scaled) * error).sum(dtype=torch.float64))
    return total


def _floored(size: Tensor) -> Tensor:
    return size.clamp_min(_DEAD * float(size.mean()) + torch.finfo(size.dtype).tiny)
