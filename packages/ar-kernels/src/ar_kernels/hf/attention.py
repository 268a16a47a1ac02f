"""`ar_native`, an attention implementation for Transformers: the token after the cache in C++.

Registered through Transformers' own interface; everything but the attention of one new token on the
CPU goes on to its `sdpa`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ar_kernels.native import steps
from ar_kernels.native.library import DTYPES

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "ar_native"
_ELSEWHERE = ("position_bias", "softcap", "cache", "s_aux")
"""What we do not compute: `sdpa` does, or says that it cannot."""


def register() -> None:
    """Make the name known to Transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return (attention [B, T, H, W], None) as Transformers' attention functions do."""
    if not dropout and _serves(query, key, value, attention_mask, kwargs):
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        given = (query, key, value, attention_mask, scale)
        return torch.ops.ar_kernels.step_attention(*given), None
    done: tuple[Tensor, None] = sdpa_attention_forward(
        *(module, query, key, value, attention_mask), dropout=dropout, scaling=scaling, **kwargs
    )
    return done


def _serves(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Tell whether our op computes this."""
    batch, heads, new, width = query.shape
    if new != 1 or not query.is_cpu or query.dtype not in DTYPES:
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return False
    if kwargs.get("output_attentions") or any(kwargs.get(k) is not None for k in _ELSEWHERE):
        return False
    if width % steps.WIDTH or width > steps.MOST_WIDTH or heads % key.shape[1]:
        return False
    if mask is not None:
        fits = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[2:] == (1, key.shape[2])  # noqa: PLR2004
        if not fits or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
            return False
    alike = key.dtype == value.dtype == query.dtype and key.is_cpu and value.is_cpu
    return alike and key.shape == value.shape and key.shape[0] == batch and key.shape[3] == width
