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
    from torch import Tensor

PAGE = 2 << 20
"""Bytes of a large page."""
REGION = 128 << 20
"""Bytes of weights that share an allocation: only whole pages are large, and its end is none."""
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


class Region:
    """Memory in large pages that weights move into, one behind the other."""

    def __init__(self, size: int) -> None:
        """Reserve room for weights of so many bytes together (`room_of` each)."""
        self._home, self._at = large_pages(size), 0

    def fits(self, weight: Tensor) -> bool:
        """Tell whether there is room for a weight."""
        return self._at + room_of(weight) <= self._home.numel()

    def take(self, weight: Tensor) -> Tensor:
        """Return a copy of a uint8 tensor [n] behind those taken before."""
        count = weight.numel()
        if not count:
            return weight.clone()
        bytes_ = (ctypes.c_uint8 * count).from_address(self._home.data_ptr() + self._at)
        bytes_.home = self._home  # type: ignore[attr-defined] # alive as long as its part is
        with torch.inference_mode(mode=False):
            # a storage of its own: a copy of the tensor copies no more than it
            place = torch.frombuffer(bytes_, dtype=torch.uint8)
        place.copy_(weight)
        self._at += room_of(weight)
        return place


def room_of(weight: Tensor) -> int:
    """Return the bytes that a weight takes in a region."""
    return (weight.numel() + _ALIGN - 1) // _ALIGN * _ALIGN


@functools.cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    """Return the C library's madvise, None where there is no such advice."""
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found
