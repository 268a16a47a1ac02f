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


def _period(bits: int) -> tuple[int, int]:
    """Return (values, words) after which a stream is word aligned again."""
    aligned = bits & -bits  # the greatest power of two that divides both width and word
    return WORD // aligned, bits // aligned
