"""Searched parameters of GGUF's types: weighted least squares per group.

The search per group follows llama.cpp's quantizers (a grid of steps, each refitted by least
squares for its codes). What is ours: the scales of a super group are rounded for several choices
of their common scale, each judged with the codes that follow from it, and the common scales are
refitted to those codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.affine import divisor

if TYPE_CHECKING:
    from torch import Tensor

_STEPS = 24
_FIRST, _STEP = -0.9, 0.075
_TINY = 1e-30


def affine_fit(groups: Tensor, weights: Tensor, top: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return (scale, minimum) [..., G] of least weighted squared error with codes 0 .. top.

    Args:
        groups: weight as [..., G, n].
        weights: importance of each element, shape of `groups`.
        top: largest code.
        signed: the minimum may be positive; otherwise it is at most 0.
    """
    smallest = groups.amin(-1) if signed else groups.amin(-1).clamp_max(0)
    spread = (groups.amax(-1) - smallest).clamp_min(0)
    best_scale, best_minimum = spread / top, smallest
    best = _affine_error(groups, weights, best_scale, best_minimum, top)
    mass, moment = weights.sum(-1), (weights * groups).sum(-1)
    for i in range(_STEPS):
        step = spread / (top + _FIRST + _STEP * i)
        codes = (groups - smallest.unsqueeze(-1)) / divisor(step).unsqueeze(-1)
        codes = codes.round_().clamp_(0, top)
        weighted = weights * codes
        s1, s2 = weighted.sum(-1), (weighted * codes).sum(-1)
        cross = (weighted * groups).sum(-1)
        det = mass * s2 - s1 * s1
        scale = (mass * cross - moment * s1) / det.clamp_min(_TINY)
        minimum = (s2 * moment - s1 * cross) / det.clamp_min(_TINY)
        if not signed:
            alone = cross / s2.clamp_min(_TINY)
            scale = torch.where(minimum > 0, alone, scale)
            minimum = minimum.clamp_max(0)
        fits = (det > _TINY) & (scale > 0)
        scale, minimum = (
            torch.where(fits, scale, best_scale),
            torch.where(fits, minimum, best_minimum),
        )
        error = _affine_error(groups, weights, scale, minimum, top)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_minimum = torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def symmetric_fit(groups: Tensor, weights: Tensor, peak: int) -> Tensor:
    """Return signed scales [..., G] of least weighted squared error, codes -peak .. peak - 1."""
    low, high = groups.amin(-1), groups.amax(-1)
    largest = torch.where(-low >= high, low, high)  # with its sign; it maps to -peak
    best = largest / -peak
    best_error = _symmetric_error(groups, weights, best, peak)
    for i in range(-9, 10):
        step = largest / -(peak + 0.1 * i)
        codes = (groups / divisor(step).unsqueeze(-1)).round_().clamp_(-peak, peak - 1)
        weighted = weights * codes
        energy = (weighted * codes).sum(-1)
        scale = torch.where(energy > 0, (weighted * groups).sum(-1) / energy.clamp_min(_TINY), best)
        error = _symmetric_error(groups, weights, scale, peak)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return best


def _affine_error(
    groups: Tensor, weights: Tensor, scale: Tensor, minimum: Tensor, top: int
) -> Tensor:
    step, offset = scale.unsqueeze(-1), minimum.unsqueeze(-1)
    codes = ((groups - offset) / divisor(step)).round_().clamp_(0, top)
    return codes.mul_(step).add_(offset).sub_(groups).square_().mul_(weights).sum(-1)


def _symmetric_error(groups: Tensor, weights: Tensor, scale: Tensor, peak: int) -> Tensor:
    step = scale.unsqueeze(-1)
    codes = (groups / divisor(step)).round_().clamp_(-peak, peak - 1)
    return codes.mul_(step).sub_(groups).square_().mul_(weights).sum(-1)
