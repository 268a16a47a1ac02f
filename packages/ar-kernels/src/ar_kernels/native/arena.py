"""Memory in large pages for weights that every token reads.

A core that streams through ordinary pages of 4 KB waits for their addresses: in a virtual machine
plain reads of memory went from 25 to 33 GB/s with pages of 2 MB. Linux gives those for aligned
ranges that ask (`madvise`), so weights lie one behind the other in such ranges.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

PAGE = 2 << 20
"""Bytes of a large page."""
CHUNK = 8 << 20
"""Bytes of weights that share an allocation; so many are in memory twice while they settle."""
_ALIGN = 64
_HUGEPAGE = 14
"""MADV_HUGEPAGE of Linux."""


def large_pages(size: int) -> Tensor:
    """Return `size` bytes, uint8, that begin at a large page; in large pages where it can be."""
    with torch.inference_mode(mode=False):
        whole = torch.empty(size + PAGE, dtype=torch.uint8)
    begin = -whole.data_ptr() % PAGE
    made = whole[begin : begin + size]
    advise = _madvise()
    if advise is not None and size >= PAGE:
        advise(made.data_ptr(), size // PAGE * PAGE, _HUGEPAGE)  # refused: as it was
    return made


def settled(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of uint8 tensors [n] that lie one behind the other in large pages."""
    out: list[Tensor] = []
    part: list[Tensor] = []
    size = 0
    for weight in weights:
        part.append(weight)
        size += _room(weight)
        if size >= CHUNK:
            out += _together(part, size)
            part, size = [], 0
    return out + (_together(part, size) if part else [])


def _room(weight: Tensor) -> int:
    return (weight.numel() + _ALIGN - 1) // _ALIGN * _ALIGN


def _together(weights: Sequence[Tensor], size: int) -> list[Tensor]:
    home, at, out = large_pages(size), 0, []
    for weight in weights:
        place = home[at : at + weight.numel()]
        place.copy_(weight)
        out.append(place)
        at += _room(weight)
    return out


@functools.cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    """Return the C library's madvise, None where there is no such advice."""
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found
