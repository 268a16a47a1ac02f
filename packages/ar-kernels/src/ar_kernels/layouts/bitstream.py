"""The one primitive of every integer layout: a dense stream of b-bit values, lowest bit first.

Value i of a stream fills bits b*i .. b*i+b-1; word k holds bits 32k .. 32k+31. Widths that do not
divide 32 let values cross words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ar_kernels.weight import KernelError

WORD = 32
_WITHIN_BYTES = (2, 4, 8)
"""Widths whose values do not cross bytes."""


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """Return [..., n] unsigned values as int32 words [..., ceil(n * bits / 32)].

    Raises:
        KernelError: a value does not fit the width.
    """
    if values.numel():
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= 2**bits:
            msg = f"values from {low} to {high} do not fit {bits} bits: 0 to {2**bits - 1} do"
            raise KernelError(msg)
    count = values.shape[-1]
    words = -(-count * bits // WORD)
    if bits in _WITHIN_BYTES:
        padded = functional.pad(values.to(torch.uint8), (0, words * WORD // bits - count))
        # flat, as strides of dimensions of size 1 may be anything
        return (
            _joined(padded.reshape(-1).contiguous(), bits)
            .view(torch.int32)
            .view(*values.shape[:-1], words)
        )
    per_period, words_per_period = _period(bits)
    periods = -(-count // per_period)
    padded = functional.pad(values, (0, periods * per_period - count))
    lanes = padded.reshape(*values.shape[:-1], periods, per_period)
    # int32 throughout: left shifts of int32 wrap into the sign bit as the format wants
    out = torch.zeros(*lanes.shape[:-1], words_per_period, dtype=torch.int32, device=values.device)
    for i in range(per_period):
        word, shift = divmod(i * bits, WORD)
        value = lanes[..., i].int()
        out[..., word] |= value << shift
        if shift + bits > WORD:
            out[..., word + 1] |= value >> (WORD - shift)
    return out.reshape(*values.shape[:-1], periods * words_per_period)[..., :words].contiguous()


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` values of int32 words [..., m] as uint8 [..., count].

    Raises:
        KernelError: there are fewer than `count` values in the words.
    """
    if words.shape[-1] * WORD < count * bits:
        msg = f"{words.shape[-1]} words cannot hold {count} values of {bits} bits"
        raise KernelError(msg)
    if bits in _WITHIN_BYTES:
        all_values = _apart(words.reshape(-1).contiguous().view(torch.uint8), bits)
        per_row = words.shape[-1] * WORD // bits
        return all_values.view(*words.shape[:-1], per_row)[..., :count].contiguous()
    per_period, words_per_period = _period(bits)
    periods = -(-count // per_period)
    needed = periods * words_per_period
    padded = functional.pad(words, (0, max(0, needed - words.shape[-1])))[..., :needed]
    lanes = padded.reshape(*words.shape[:-1], periods, words_per_period)
    out = torch.empty(*lanes.shape[:-1], per_period, dtype=torch.uint8, device=words.device)
    for i in range(per_period):
        word, shift = divmod(i * bits, WORD)
        value = lanes[..., word] >> shift  # copies the sign bit downwards: masked off below
        if shift + bits > WORD:
            value = value & (2 ** (WORD - shift) - 1) | lanes[..., word + 1] << (WORD - shift)
        out[..., i] = (value & (2**bits - 1)).to(torch.uint8)
    return out.reshape(*words.shape[:-1], periods * per_period)[..., :count].contiguous()


def _apart(packed: Tensor, bits: int) -> Tensor:
    """Return the values [n * 8 / bits] of bytes [n].

    Lanes of as many bytes as a byte has values are halved until each byte holds one: as many
    operations for all values as reading them one after the other takes for each.
    """
    if bits == 8:  # noqa: PLR2004
        return packed
    if bits == 4:  # noqa: PLR2004
        lanes = packed.to(torch.int16)
        lanes |= lanes << 4
        lanes &= 0x0F0F
        return lanes.view(torch.uint8)
    lanes = packed.to(torch.int32)
    lanes |= lanes << 12
    lanes &= 0x000F000F
    lanes |= lanes << 6
    lanes &= 0x03030303
    return lanes.view(torch.uint8)


def _joined(values: Tensor, bits: int) -> Tensor:
    """Return bytes [n * bits / 8] of values [n]; the inverse of `_apart`."""
    if bits == 8:  # noqa: PLR2004
        return values
    if bits == 4:  # noqa: PLR2004
        lanes = values.view(torch.int16)
        return (lanes | lanes >> 4).to(torch.uint8)
    lanes = values.view(torch.int32)
    lanes = lanes | lanes >> 6
    return (lanes & 0xF | lanes >> 12 & 0xF0).to(torch.uint8)


def _period(bits: int) -> tuple[int, int]:
    """Return (values, words) after which a stream is word aligned again."""
    aligned = bits & -bits  # the greatest power of two that divides both width and word
    return WORD // aligned, bits // aligned
