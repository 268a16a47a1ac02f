"""Pieces of GGUF blocks: bit planes, half-and-half nibbles, six-bit scales, fp16 fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def half_bytes(values: Tensor) -> Tensor:
    """Return float16 [..., n] as bytes [..., 2 n]."""
    return values.contiguous().view(torch.uint8)


def bytes_half(raw: Tensor) -> Tensor:
    """Return bytes [..., 2 n] as float16 [..., n]."""
    return raw.contiguous().view(torch.float16)


def pack_planes(codes: Tensor, width: int) -> Tensor:
    """Return values [..., k, n] below 2**width as bytes [..., n]: value j at bit j * width."""
    out = torch.zeros_like(codes[..., 0, :])
    for j in range(codes.shape[-2]):
        out |= codes[..., j, :] << (j * width)
    return out


def unpack_planes(raw: Tensor, width: int, count: int) -> Tensor:
    """Return bytes [..., n] as values [..., count, n]; the inverse of `pack_planes`."""
    mask = 2**width - 1
    return torch.stack([raw >> (j * width) & mask for j in range(count)], -2)


def pack_scales_min(scale: Tensor, minimum: Tensor) -> Tensor:
    """Return six-bit scales and minima [..., 8] as the 12 bytes of Q4_K and Q5_K."""
    first = scale[..., :4] | scale[..., 4:] >> 4 << 6
    second = minimum[..., :4] | minimum[..., 4:] >> 4 << 6
    third = (scale[..., 4:] & 15) | (minimum[..., 4:] & 15) << 4
    return torch.cat([first, second, third], -1)


def unpack_scales_min(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the six-bit scales and minima [..., 8] of Q4_K and Q5_K."""
    first, second, third = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    scale = torch.cat([first & 63, (third & 15) | first >> 6 << 4], -1)
    minimum = torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1)
    return scale, minimum


def pack_scales_q3(values: Tensor) -> Tensor:
    """Return six-bit values [..., 16] as the 12 bytes of Q3_K."""
    low = (values[..., :8] & 15) | (values[..., 8:] & 15) << 4
    return torch.cat([low, pack_planes((values >> 4).unflatten(-1, (4, 4)), 2)], -1)


def unpack_scales_q3(raw: Tensor) -> Tensor:
    """Return the six-bit values [..., 16] of Q3_K."""
    low = torch.cat([raw[..., :8] & 15, raw[..., :8] >> 4], -1)
    return low | unpack_planes(raw[..., 8:], 2, 4).flatten(-2) << 4
