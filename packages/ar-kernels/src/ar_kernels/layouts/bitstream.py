"""The one primitive of every integer layout: a dense stream of b-bit values, lowest bit first.

Value i of a stream fills bits b*i .. b*i+b-1; word k holds bits 32k .. 32k+31. Widths that do not
divide 32 let values cross words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ar_kernels.weight import KernelError

WORD = 32


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """Return [..., n] unsigned values as int32 words [..., ceil(n * bits / 32)].

    Raises:
        KernelError: a value does not fit the width.
    """
    if values.numel() and int(values.max()) >= 2**bits:
        msg = f"value {int(values.max())} does not fit {bits} bits"
        raise KernelError(msg)
    n = values.shape[-1]
    words = -(-n * bits // WORD)
    per_period = WORD // _gcd(bits)  # values after which the stream is word aligned again
    periods = -(-n // per_period)
    padded = torch.nn.functional.pad(values.long(), (0, periods * per_period - n))
    lanes = padded.reshape(*values.shape[:-1], periods, per_period)
    per_word = per_period * bits // WORD
    out = torch.zeros(*lanes.shape[:-1], per_word, dtype=torch.int64, device=values.device)
    for i in range(per_period):
        word, shift = divmod(i * bits, WORD)
        out[..., word] |= (lanes[..., i] << shift) & 0xFFFFFFFF
        if shift + bits > WORD:
            out[..., word + 1] |= lanes[..., i] >> (WORD - shift)
    flat = out.reshape(*values.shape[:-1], periods * per_word)[..., :words]
    return torch.where(flat >= 2**31, flat - 2**32, flat).to(torch.int32).contiguous()


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` values of int32 words [..., m] as uint8 [..., count]."""
    if words.shape[-1] * WORD < count * bits:
        msg = f"{words.shape[-1]} words cannot hold {count} values of {bits} bits"
        raise KernelError(msg)
    per_period = WORD // _gcd(bits)
    per_word = per_period * bits // WORD
    periods = -(-count // per_period)
    padded = torch.nn.functional.pad(
        words, (0, max(0, periods * per_word - words.shape[-1]))
    )[..., : periods * per_word]
    lanes = padded.long().reshape(*words.shape[:-1], periods, per_word) & 0xFFFFFFFF
    out = torch.empty(
        *lanes.shape[:-1], per_period, dtype=torch.uint8, device=words.device
    )
    mask = 2**bits - 1
    for i in range(per_period):
        word, shift = divmod(i * bits, WORD)
        value = lanes[..., word] >> shift
        if shift + bits > WORD:
            value = value | (lanes[..., word + 1] << (WORD - shift))
        out[..., i] = (value & mask).to(torch.uint8)
    return out.reshape(*words.shape[:-1], periods * per_period)[..., :count].contiguous()


def _gcd(bits: int) -> int:
    """Return the greatest power of two that divides both the width and the word."""
    return bits & -bits
