"""Causal attention of short rows with gradients: products of matrices around one pass of softmax.

torch's flash attention never holds the scores of all queries. For rows of a few hundred tokens
they fit into a cache, and whole products take a third of the time (7 rows of 256 tokens, 4 heads
of 64, one core: forward 7.5 to 3 ms, backward 20 to 7). Scores are rounded to bfloat16 once.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.native import library as lib
from ar_kernels.native import tuning

if TYPE_CHECKING:
    from torch import Tensor

MOST = 512
"""Tokens of a row: the scores that are kept for the backward pass grow with their square."""
_FASTEST = "avx512_bf16"
"""Only where a processor multiplies bfloat16 are plain products faster."""


class _Scores(ctypes.Structure):
    """`ar_scores` of api_tuning.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "weights")),
        *((name, ctypes.c_int64) for name in ("rows", "queries", "keys", "dtype")),
        ("scale", ctypes.c_float),
    )


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether `attention` takes queries, keys and values, and gains by it."""
    if not all(t.dim() == 4 and t.dtype is torch.bfloat16 for t in (q, k, v)):  # noqa: PLR2004
        return False
    alike = q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and k.shape == v.shape
    fits = alike and 0 < q.shape[2] <= MOST and k.shape[1] and q.shape[1] % k.shape[1] == 0
    return bool(fits) and tuning.serves(q, k, v) and lib.best_isa() == _FASTEST


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return causal softmax attention, bfloat16 [B, H, T, W].

    Args:
        q: bfloat16 [B, H, T, W] on the CPU.
        k: [B, N, T, W], where N divides H; head h looks at h // (H / N).
        v: as `k`.
        scale: of the products of q and k.
    """
    out: Tensor = _Attention.apply(q, k, v, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        count, tokens, width = k.shape[0] * k.shape[1], *k.shape[2:]
        # heads that share keys become rows of one product
        queries, keys, values = (t.reshape(count, -1, width) for t in (q, k, v))
        weights = _softened(torch.bmm(queries, keys.transpose(1, 2)), None, tokens, scale)
        ctx.save_for_backward(queries, keys, values, weights)
        ctx.scale = scale
        return torch.bmm(weights, values).view(q.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, weights = ctx.saved_tensors
        count, tokens, width = keys.shape
        batch = grad.shape[0]
        wanted = grad.reshape(count, -1, width)
        to_values = torch.bmm(weights.transpose(1, 2), wanted)
        scores = torch.bmm(wanted, values.transpose(1, 2))
        scores = _softened(scores, weights, tokens, ctx.scale)
        to_keys = torch.bmm(scores.transpose(1, 2), queries)
        shape = batch, count // batch, tokens, width
        to_queries = torch.bmm(scores, keys).view(grad.shape)
        return to_queries, to_keys.view(shape), to_values.view(shape), None


def _softened(scores: Tensor, weights: Tensor | None, queries: int, scale: float) -> Tensor:
    """Change scores [N, R, K] to their softmax, or its gradient to theirs; rows in turn."""
    keys = scores.shape[-1]
    given = _Scores(
        *(scores.data_ptr(), None if weights is None else weights.data_ptr()),
        *(scores.numel() // keys, queries, keys, lib.DTYPES[scores.dtype], scale),
    )
    lib.check(lib.library().ar_soften(lib.runtime(lib.best_isa()), ctypes.byref(given)))
    return scores
