"""Give memory back to the system while a checkpoint is repacked layer by layer. Linux only.

Two things pile up otherwise. The C library keeps freed temporaries of 4 to 32 MB for itself, in
holes that later layers' tensors do not fit: 70 to 130 MB for 280 MB packed. And pages of the
checkpoint's mapped files stay in the resident set after their tensors were repacked, because the
mapping lives as long as any tensor of the file does: the packed size once more.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from torch import Tensor

_EVERY = 2**23
"""Bytes of mapped tensors after which memory is given back: a few milliseconds each time."""
_DONT_NEED = 4
_FIELDS = 6
"""Of a line of /proc/self/maps that names a file."""


class Returning:
    """Collects tensors of a checkpoint that nobody needs any more and gives their memory back.

    Only pages of the files are dropped, and only where they are mapped: a tensor that is read all
    the same is read from its file again.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        """Give back memory of these files."""
        self._files = {str(Path(file).resolve()) for file in files}
        self._spans: list[tuple[int, int]] = []
        self._bytes = 0

    def done_with(self, tensors: Iterable[Tensor]) -> None:
        """Take tensors as they were loaded that nobody reads; their memory goes now or soon."""
        for tensor in tensors:
            if tensor.device.type == "cpu":
                start = tensor.data_ptr()
                self._spans.append((start, start + tensor.nbytes))
                self._bytes += tensor.nbytes
        if self._bytes >= _EVERY:
            self.finish()

    def seldom_read(self, tensor: Tensor) -> Callable[[Tensor], None]:
        """Return what gives parts of a tensor back that stays but is seldom read.

        Nothing where a byte of its file's pages in memory was written to: that would be lost.
        """
        clean: list[tuple[int, int]] = []
        if sys.platform.startswith("linux") and tensor.device.type == "cpu":
            clean = _mapped(self._files, untouched=True)

        def give_back(part: Tensor) -> None:
            start = part.data_ptr()
            _give_back([(start, start + part.nbytes)], clean)

        return give_back

    def finish(self) -> None:
        """Give back what was collected."""
        spans, self._spans, self._bytes = self._spans, [], 0
        if not sys.platform.startswith("linux") or not spans:
            return
        _give_back(spans, _mapped(self._files))
        trim()


def trim() -> None:
    """Give what the C library keeps of freed memory back to the system, where it is glibc."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


def _give_back(spans: list[tuple[int, int]], files: list[tuple[int, int]]) -> None:
    libc = ctypes.CDLL(None)
    for start, end in _pages(spans, files):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)


def _pages(spans: list[tuple[int, int]], files: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the whole pages in spans of memory that lie inside mapped files."""
    page = mmap.PAGESIZE
    whole = [(-(-start // page) * page, end // page * page) for start, end in spans]
    return [
        (start, end)
        for start, end in whole
        if start < end and any(low <= start and end <= high for low, high in files)
    ]


def _mapped(files: Container[str], *, untouched: bool = False) -> list[tuple[int, int]]:
    """Return where files are mapped, as (first, end) addresses.

    Args:
        files: their paths.
        untouched: only those no byte of which was written to.
    """
    out: list[tuple[int, int]] = []
    ours = False
    table = Path("/proc/self/smaps" if untouched else "/proc/self/maps")
    for line in table.read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=_FIELDS - 1)
        if "-" in fields[0]:  # a mapping; its numbers follow
            ours = len(fields) == _FIELDS and fields[-1].rstrip() in files
            if ours:
                low, high = fields[0].split("-")
                out.append((int(low, 16), int(high, 16)))
        elif ours and untouched and fields[0] == "Anonymous:" and fields[1] != "0":
            out.pop()
            ours = False
    return out
