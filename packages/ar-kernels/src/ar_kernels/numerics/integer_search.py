"""Searched integer parameters: a grid of clip factors, then alternating least squares.

The grid is that of SignRoundV2's scale initialisation (arXiv 2512.04746) in both sign
orientations; the least-squares refit of the scale for fixed codes is ours. Every candidate is
judged with the scale rounded to the stored precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.rounding import floored, stored

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ar_schemes import TensorSpec

_GRID = {2: (0.35, 1.1), 3: (0.5, 1.15)}
_WIDE = (0.55, 1.15)
_STEPS = 60
_REFITS = 3


def search_symmetric(groups: Tensor, spec: TensorSpec, weights: Tensor | None) -> Tensor:
    """Return scales [..., R, G] (signed) of least weighted squared error.

    Args:
        groups: weight as [..., R, G, n].
        spec: symmetric integer spec.
        weights: importance of each element, shape of `groups`, or None.
    """
    peak = 2 ** (spec.bits - 1)
    below, above = -groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    # the element of largest magnitude maps to code -peak, as without search
    absmax = torch.where(above >= below, -above, below) / peak
    best = stored(floored(absmax), spec)
    best_error = _error_symmetric(groups, best, weights, peak)
    first, last = _GRID.get(spec.bits, _WIDE)
    for factor in torch.linspace(first, last, _STEPS).tolist():
        for sign in (1.0, -1.0):
            scale = stored(floored(absmax * factor * sign), spec)
            best, best_error = _keep(
                best, best_error, scale, _error_symmetric(groups, scale, weights, peak)
            )
    for _ in range(_REFITS):
        codes = _symmetric_codes(groups, best, peak)
        weighted = codes if weights is None else codes * weights
        energy = (weighted * codes).sum(-1)
        fitted = (weighted * groups).sum(-1) / energy.clamp_min(torch.finfo(energy.dtype).tiny)
        scale = stored(floored(torch.where(energy > 0, fitted, best)), spec)
        best, best_error = _keep(
            best, best_error, scale, _error_symmetric(groups, scale, weights, peak)
        )
    return best


def search_asymmetric(
    groups: Tensor, spec: TensorSpec, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (scale, zero point) [..., R, G] of least weighted squared error.

    The best corner of a grid of clip factors, then rounds of least squares: for the codes as they
    are, the scale that fits them with the zero point, the one below and the one above.
    """
    top = 2**spec.bits - 1
    smallest, largest = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = stored(floored((largest - smallest) / top), spec)
    zero = (-smallest / scale).round().clamp(0, top)
    best = _Affine(scale, zero, _error_asymmetric(groups, scale, zero, weights, top))
    for low, high in _corner_factors(spec.bits):
        scale = stored(floored((largest * high - smallest * low) / top), spec)
        zero = (-smallest * low / scale).round().clamp(0, top)
        best = best.or_better(scale, zero, _error_asymmetric(groups, scale, zero, weights, top))
    for _ in range(_REFITS):
        start = best
        for shift in (0.0, -1.0, 1.0):
            zero = (start.zero + shift).clamp(0, top)
            scale = stored(floored(_fitted(groups, start.scale, zero, weights, top)), spec)
            best = best.or_better(scale, zero, _error_asymmetric(groups, scale, zero, weights, top))
    return best.scale, best.zero


@dataclass(frozen=True)
class _Affine:
    """The best scale and zero point of each group so far, with their error."""

    scale: Tensor
    zero: Tensor
    error: Tensor

    def or_better(self, scale: Tensor, zero: Tensor, error: Tensor) -> _Affine:
        better = error < self.error
        return _Affine(
            torch.where(better, scale, self.scale),
            torch.where(better, zero, self.zero),
            torch.where(better, error, self.error),
        )


def _fitted(
    groups: Tensor, scale: Tensor, zero: Tensor, weights: Tensor | None, top: int
) -> Tensor:
    """Return the scale of least squares for the codes that a scale and a zero point give."""
    offset = zero.unsqueeze(-1)
    steps = (groups / scale.unsqueeze(-1)).round_().add_(offset).clamp_(0, top).sub_(offset)
    weighted = steps if weights is None else steps * weights
    energy = (weighted * steps).sum(-1)
    fitted = (weighted * groups).sum(-1) / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    return torch.where((energy > 0) & (fitted > 0), fitted, scale)


def _corner_factors(bits: int) -> Iterator[tuple[float, float]]:
    first = _GRID.get(bits, _WIDE)[0]
    factors = torch.linspace(first, 1.0, 11).tolist()
    return ((low, high) for low in factors for high in factors)


def _symmetric_codes(groups: Tensor, scale: Tensor, peak: int) -> Tensor:
    return (groups / scale.unsqueeze(-1)).round_().clamp_(-peak, peak - 1)


def _error_symmetric(groups: Tensor, scale: Tensor, weights: Tensor | None, peak: int) -> Tensor:
    codes = _symmetric_codes(groups, scale, peak)
    error = codes.mul_(scale.unsqueeze(-1)).sub_(groups).square_()
    return error.sum(-1) if weights is None else error.mul_(weights).sum(-1)


def _error_asymmetric(
    groups: Tensor, scale: Tensor, zero: Tensor, weights: Tensor | None, top: int
) -> Tensor:
    step, offset = scale.unsqueeze(-1), zero.unsqueeze(-1)
    codes = (groups / step).round_().add_(offset).clamp_(0, top).sub_(offset)
    error = codes.mul_(step).sub_(groups).square_()
    return error.sum(-1) if weights is None else error.mul_(weights).sum(-1)


def _keep(best: Tensor, best_error: Tensor, scale: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    better = error < best_error
    return torch.where(better, scale, best), torch.where(better, error, best_error)
