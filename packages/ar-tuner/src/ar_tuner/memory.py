"""Freed memory goes back to the system, not only to the C library."""

from __future__ import annotations

import ctypes
import sys


def trim() -> None:
    """Give freed memory back to the system, where the C library keeps it (glibc does).

    Blocks come and go in thousands of allocations of all sizes; without this the heap of a run on
    a model of 16 blocks of 26 MB grew by 40 MB with every block, though nothing was held.
    """
    if sys.platform == "linux":
        release = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if release is not None:
            release(0)
