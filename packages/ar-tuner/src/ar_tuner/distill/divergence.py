"""Kullback-Leibler divergence between the predictions of two models, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.native import tuning

if TYPE_CHECKING:
    from torch import Tensor

_CACHED = 2**17
"""Logits worked on at a time on a CPU: float32 copies of these stay in a core's cache. At 2**22
the divergence of 1024 tokens and 4096 words took 52 ms, at 2**17 it takes 11."""
_LARGE = 2**24
"""The same on other devices, where every launch costs: what the copies need stays small."""


class Divergence(torch.autograd.Function):
    """Mean over tokens of KL(reference || candidate), in nats.

    The gradient, softmax(candidate) - softmax(reference), falls out of the forward pass; nothing
    but it is kept, in the type of the logits, and not yet divided by the number of tokens: whoever
    differentiates a sum over tokens loses nothing of it to a small type.
    """

    @staticmethod
    def forward(ctx: Any, candidate: Tensor, reference: Tensor) -> Tensor:
        """Return the divergence, float32 []; both logits [..., V], the reference constant."""
        vocabulary = candidate.shape[-1]
        mine, theirs = candidate.reshape(-1, vocabulary), reference.reshape(-1, vocabulary)
        ctx.shape = candidate.shape
        ctx.tokens = tokens = mine.shape[0]
        if tuning.serves(mine, theirs) and mine.dtype == theirs.dtype:
            total, grad = tuning.diverge(mine, theirs)
        else:
            total, grad = _by_parts(mine, theirs)
        ctx.save_for_backward(grad)
        return total / tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the candidate's logits."""
        (kept,) = ctx.saved_tensors
        share = grad / ctx.tokens
        if share.device.type != "cpu" or float(share) != 1.0:  # elsewhere asking would wait
            kept = kept * share.to(kept.dtype)
        return kept.reshape(ctx.shape), None


def _by_parts(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `tuning.diverge` does, by torch."""
    tokens, vocabulary = mine.shape
    grad = torch.empty_like(mine)
    total = torch.zeros((), device=mine.device)
    rows = max(1, (_CACHED if mine.device.type == "cpu" else _LARGE) // vocabulary)
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        x, y = mine[part].float(), theirs[part].float()
        q, p = x.softmax(-1), y.softmax(-1)
        # log p - log q, but for the sums: those of the rows, read off the largest probability
        shift = (y.amax(-1) - p.amax(-1).log_()) - (x.amax(-1) - q.amax(-1).log_())
        total += torch.dot(p.flatten(), (y - x).flatten()) - shift.sum()
        grad[part] = q.sub_(p)
    return total, grad


def divergence(candidate: Tensor, reference: Tensor) -> Tensor:
    """Return the mean over tokens of KL(reference || candidate) of logits [..., V], in nats."""
    return Divergence.apply(candidate, reference)
