"""Orders of rows: ggml's rope wants q and k interleaved, its qkv wants q, k and v apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ar_export.gguf.metadata import head_dim, heads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_export.gguf.architectures import Architecture
    from ar_kernels import QuantizedWeight


def row_order(name: str, arch: Architecture, config: Mapping[str, Any]) -> Tensor | None:
    """Return which source row each row of a GGUF tensor is, or None: as they are."""
    count, shared = heads(config)
    tail = name.split(".")[-2]
    if arch.permuted and tail in ("attn_q", "attn_k"):
        number = count if tail == "attn_q" else shared
        return pairs_apart(number * head_dim(config), number)
    if arch.qkv_grouped and tail == "attn_qkv":
        size = head_dim(config)
        rows = torch.arange((count + 2 * shared) * size)
        groups = rows.reshape(shared, count // shared + 2, size)
        parts = (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])
        return torch.cat([part.reshape(-1) for part in parts])
    return None


def pairs_apart(rows: int, heads: int) -> Tensor:
    """Return which source row each row of q or k is: the halves of a head become pairs."""
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def reordered(weight: QuantizedWeight, order: Tensor) -> QuantizedWeight:
    """Return the weight with its rows in another order."""
    rows = weight.shape[-2]

    def moved(tensor: Tensor) -> Tensor:
        return tensor[order] if tensor.shape[0] == rows else tensor

    return replace(
        weight,
        codes=moved(weight.codes),
        scale=moved(weight.scale),
        zero_point=None if weight.zero_point is None else moved(weight.zero_point),
        extra={k: moved(v) for k, v in weight.extra.items()},
    )
