"""How far a block's output is from its reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import log_softmax

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ar_tuner.algorithms.base import BlockTask

    Loss = Callable[[Tensor, Tensor], Tensor]

SHARE = 1000
"""One element in so many is left out as an outlier."""
NARROW = 4
"""Weights below, and activations up to, so many bits leave outliers that would lead the loss."""


def mse(output: Tensor, reference: Tensor) -> Tensor:
    """Return the mean squared error, computed in float32."""
    return (output.float() - reference.float()).square().mean()


def suppressed_mse(output: Tensor, reference: Tensor) -> Tensor:
    """Return the mean squared error with the largest 0.1 % of the errors (at least one) zeroed.

    The mean is still over all elements; of equal errors at the limit all stay. Source:
    SignRoundV2 (arXiv 2512.04746).
    """
    error = output.float() - reference.float()
    size = error.detach().abs().flatten()
    dropped = max(1, size.numel() // SHARE)
    kept = size.topk(min(dropped + 1, size.numel())).values.min()
    return (error * (error.detach().abs() <= kept)).square().mean()


def kl_divergence(output: Tensor, reference: Tensor) -> Tensor:
    """Return KL(reference || output) in nats, mean over tokens, of two sets of logits [n, V]."""
    ours, theirs = log_softmax(output.float(), -1), log_softmax(reference.float(), -1)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


def loss_of(task: BlockTask) -> Loss:
    """Return the loss that a block is tuned with.

    `suppressed` leaves outliers out where a weight has less than 4 bits or activations at most 4.
    """
    if task.settings.loss == "suppressed" and any(_narrow(task)):
        return suppressed_mse
    return mse


def _narrow(task: BlockTask) -> list[bool]:
    out = []
    for target in task.targets:
        weight, act = target.scheme.weight, target.scheme.activation
        assert weight is not None
        out.append(weight.bits < NARROW or (act is not None and act.bits <= NARROW))
    return out
