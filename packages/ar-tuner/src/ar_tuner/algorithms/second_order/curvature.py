"""The matrix that measures errors, ready for solving: order, damping, Cholesky factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ar_tuner.errors import TunerError

_DEAD = 1e-8
"""An input channel below this share of the mean energy carries nothing."""
_TRIES, _MORE = 6, 3.0
_NO_DOUBLE = ("mps", "hpu", "xpu")


@dataclass(frozen=True)
class Curvature:
    """H of J(E) = trace(E H E^T), E [O, I] the error of a weight.

    Attributes:
        gram: H [I, I] in storage order; dead channels stand alone with a diagonal of the mean.
        order: channels by falling energy; ties in storage order.
        ordered: H in that order.
        upper: upper Cholesky factor of the inverse of the damped H, in that order.
        damping: share of the mean of the diagonal that was added for `upper`.
    """

    gram: Tensor
    order: Tensor
    ordered: Tensor
    upper: Tensor
    damping: float

    @property
    def diagonal(self) -> Tensor:
        """Energy of each input channel in storage order, damped: never zero."""
        diagonal = self.gram.diagonal()
        return diagonal + self.damping * diagonal.mean()

    def error(self, difference: Tensor) -> Tensor:
        """Return J of each row of a difference [O, I], float64 [O]."""
        return ((difference @ self.gram).double() * difference).sum(-1)


def curvature(gram: Tensor, damping: float) -> Curvature:
    """Return the curvature of a second moment [I, I].

    A channel that carries nothing is cut off from the others: its weights are rounded to nearest,
    since what is silent in calibration may speak elsewhere.

    Raises:
        TunerError: no damping makes the matrix positive definite (it is not finite).
    """
    gram = gram.clone()
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    dead = diagonal <= _DEAD * mean
    gram[dead, :] = 0
    gram[:, dead] = 0
    gram.diagonal()[dead] = torch.where(mean > 0, mean, torch.ones_like(mean))
    order = gram.diagonal().argsort(descending=True, stable=True)
    ordered = gram[order][:, order].contiguous()
    for _ in range(_TRIES):
        upper = _factor(ordered, damping)
        if upper is not None:
            return Curvature(gram, order, ordered, upper, damping)
        damping *= _MORE
    msg = (
        f"the second moment of a layer's inputs ({len(gram)} channels) has no Cholesky factor even "
        f"with {damping / _MORE:.2g} of its mean added; the activations are probably not finite"
    )
    raise TunerError(msg)


def _factor(ordered: Tensor, damping: float) -> Tensor | None:
    kind = torch.float32 if ordered.device.type in _NO_DOUBLE else torch.float64
    damped = ordered.to(kind)
    damped.diagonal().add_(damping * ordered.diagonal().mean().to(kind))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or not upper.isfinite().all():
        return None
    return upper.float()
