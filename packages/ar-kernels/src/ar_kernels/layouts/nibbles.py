"""Two 4-bit codes in a byte: the even column in the low half, the odd one in the high half."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Return uint8 codes [..., n] below 16 as bytes [..., n / 2]."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous()


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Return bytes [..., m] as uint8 codes [..., 2 m]."""
    return torch.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
