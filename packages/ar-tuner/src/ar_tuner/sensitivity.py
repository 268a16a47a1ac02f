"""How much the model's predictions depend on what each block gives for each token.

One backward pass of the float model, of the log probability of labels that the model draws itself:
the mean square of that gradient is the diagonal of the Fisher information, so a token's share of
it says what an error there costs in divergence (the token side of GuidedQuant,
arXiv 2505.07004).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_tuner.auto_scheme.sweep import Listener, Sweep, sweep
from ar_tuner.logits import drawn_loss
from ar_tuner.residence import on_call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_tuner.pipeline import Job

CLIPPED = 0.999
"""Larger weights than this share of all are cut to the largest of them: a few tokens that draw
all attention would decide everything."""


def token_weights(job: Job) -> list[Tensor]:
    """Return the weight of each token at the output of each block, [N, T] by block, mean 1.

    A batch of rows goes forth and back at a time, and of that one block's graph is alive. A block
    that the predictions do not depend on has weights of 1.
    """
    assert job.rows is not None
    blocks = job.discovery.blocks
    parts: list[list[Tensor]] = [[] for _ in blocks]
    with on_call(job.residence, [b.module for b in blocks]):
        for number, rows in enumerate(job.rows.split(job.settings.batch_size)):
            listener = _Felt(job.settings.seed * 1_000_003 + number, len(blocks))
            sweep(Sweep(job.model, job.adapter, blocks, (rows,)), listener)
            for kept, found in zip(parts, listener.squares, strict=True):
                kept.append(torch.zeros(rows.shape) if found is None else found.cpu())
    return [balanced(torch.cat(part)) for part in parts]


def balanced(squares: Tensor) -> Tensor:
    """Return weights [N, T] in proportion to squared gradients, but for the largest; mean 1."""
    flat = squares.double().flatten()
    limit = flat.kthvalue(max(1, int(CLIPPED * flat.numel()))).values
    clipped = squares.double().clamp_max(limit)
    mean = clipped.mean()
    if not (torch.isfinite(mean) and mean > 0):
        return torch.ones(squares.shape)
    return (clipped / mean).float()


class _Felt(Listener):
    """Keeps the squared gradient of each token at the output of each block."""

    def __init__(self, seed: int, blocks: int) -> None:
        self._seed = seed
        self.squares: list[Tensor | None] = [None] * blocks

    def loss(self, logits: Tensor, rows: Tensor, number: int) -> Tensor:  # noqa: ARG002
        """Return minus the log probability of labels that the model draws."""
        return drawn_loss(logits, seed=self._seed)

    def arrived(self, index: int, number: int, gradients: Sequence[Tensor | None]) -> None:  # noqa: ARG002
        """Take the gradient of a block's hidden state [B, T, H], the first of its outputs."""
        if not gradients or gradients[0] is None:
            return
        square = gradients[0].detach().float().square().sum(-1)
        known = self.squares[index]
        self.squares[index] = square if known is None else known + square
