"""Which of torch's attention kernels runs where gradients are taken."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

SHORT = 512
"""Tokens up to which plain products cost less than the fused kernel's backward pass on a CPU: 8
rows of 256, the whole model forward and backward, take 355 ms with them and 403 without."""


@contextlib.contextmanager
def cheap_backward(tokens: int, device: torch.device) -> Iterator[None]:
    """Choose the kernel for rows of some tokens, as long as the context lasts.

    The plain products keep a square of attention weights for each head, so longer rows keep the
    fused kernel. Models that do not call `scaled_dot_product_attention` are not concerned.
    """
    if device.type != "cpu" or tokens > SHORT:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
