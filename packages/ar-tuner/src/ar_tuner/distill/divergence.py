"""Kullback-Leibler divergence between the predictions of two models, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

_PART = 2**22
"""Logits worked on at a time: what float32 copies of them need stays small."""


class Divergence(torch.autograd.Function):
    """Mean over tokens of KL(reference || candidate), in nats.

    The gradient, softmax(candidate) - softmax(reference), falls out of the forward pass; nothing
    but it is kept, in the type of the logits.
    """

    @staticmethod
    def forward(ctx: Any, candidate: Tensor, reference: Tensor) -> Tensor:
        """Return the divergence, float32 []; both logits [..., V], the reference constant."""
        vocabulary = candidate.shape[-1]
        mine, theirs = candidate.reshape(-1, vocabulary), reference.reshape(-1, vocabulary)
        tokens = mine.shape[0]
        grad = torch.empty_like(mine)
        total = torch.zeros((), device=mine.device)
        rows = max(1, _PART // vocabulary)
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            p, q = torch.log_softmax(theirs[part].float(), -1), mine[part].float()
            q = q - torch.logsumexp(q, -1, keepdim=True)
            weight = p.exp()
            total += p.sub_(q).mul_(weight).sum()
            grad[part] = q.exp_().sub_(weight).mul_(1.0 / tokens)
        ctx.save_for_backward(grad)
        ctx.shape = candidate.shape
        return total / tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the candidate's logits."""
        (kept,) = ctx.saved_tensors
        return (kept * grad.to(kept.dtype)).reshape(ctx.shape), None


def divergence(candidate: Tensor, reference: Tensor) -> Tensor:
    """Return the mean over tokens of KL(reference || candidate) of logits [..., V], in nats."""
    return Divergence.apply(candidate, reference)
