"""Codes as 32-bit words in the order the Triton kernels read.

Columns come in tiles of 16 * P, P = 32 / main bits. Row r (of 16) of a tile holds, in field j,
the code of column `16 * j + r` of the tile: field j of all 16 rows is a run of 16 neighbouring
columns, which never straddles a group whose size is a multiple of 16. Widths that do not divide
32 have a second plane with the upper bits, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLICE = 16
"""Columns that one field of a tile covers."""
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 7: (8, 0), 8: (8, 0)}
"""Bits of a code to (bits in the main plane, bits in the upper plane)."""
_UPPER = {8: torch.uint8, 16: torch.int16}
"""Bits of one entry of the upper plane (P fields) to its type."""


def fields(bits: int) -> int:
    """Return P, the codes in one word of the main plane."""
    return 32 // PLANES[bits][0]


def tile(bits: int) -> int:
    """Return the columns of a tile, 16 * P."""
    return SLICE * fields(bits)


def tiles(columns: int, bits: int) -> int:
    """Return the tiles that hold `columns`; the last one may be filled up with code 0."""
    return -(-columns // tile(bits))


def pack_words(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Return (main plane, upper plane or None) of uint8 codes [O, I].

    Both planes are [tiles * 16, O]: int32, and uint8 or int16 for the upper one.
    """
    main, upper = PLANES[bits]
    low = _plane(codes & (2**main - 1), main, fields(bits), torch.int32)
    if not upper:
        return low, None
    return low, _plane(codes >> main, upper, fields(bits), _UPPER[upper * fields(bits)])


def unpack_words(low: Tensor, high: Tensor | None, bits: int, columns: int) -> Tensor:
    """Return the uint8 codes [O, I]; the exact inverse of `pack_words`."""
    main, upper = PLANES[bits]
    codes = _unplane(low, main, fields(bits))
    if high is not None:
        codes |= _unplane(high, upper, fields(bits)) << main
    return codes[:, :columns].contiguous()


def _plane(codes: Tensor, bits: int, count: int, dtype: torch.dtype) -> Tensor:
    rows, columns = codes.shape
    short = -columns % (SLICE * count)
    filled = torch.nn.functional.pad(codes, (0, short)).reshape(rows, -1, count, SLICE)
    word = torch.zeros(rows, filled.shape[1], SLICE, dtype=torch.int64, device=codes.device)
    for j in range(count):
        word |= filled[:, :, j].long() << (bits * j)
    width = bits * count
    if dtype != torch.uint8:  # the same bits as a signed number
        word = torch.where(word >= 2 ** (width - 1), word - 2**width, word)
    return word.to(dtype).reshape(rows, -1).t().contiguous()


def _unplane(plane: Tensor, bits: int, count: int) -> Tensor:
    rows = plane.shape[1]
    word = plane.t().reshape(rows, -1, 1, SLICE)
    shifts = torch.arange(count, device=plane.device).mul_(bits).reshape(1, 1, count, 1)
    codes = (word.long() >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).reshape(rows, -1)
