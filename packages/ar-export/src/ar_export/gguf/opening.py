"""Open GGUF files whose header may be damaged.

gguf's reader takes the lengths in a header as they are: past the end of the file it reads numbers
of no bytes, as many as an array says it has, until memory is gone. So a header is walked through
before.
"""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import gguf

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number by the type of a value (ggml's gguf.md)."""
_STRING, _ARRAY = 8, 9
_MOST = 1 << 22
"""Items of an array; the longest known, of tokens and their merges, have some 600,000."""
_DEEPEST = 4
_FIRST_KEY = 24


def open_reader(path: Path) -> gguf.GGUFReader:
    """Return gguf's reader of a file.

    Raises:
        ValueError: the header does not fit in the file, or is none; gguf's reader may also raise
            IndexError, KeyError or UnicodeDecodeError.
        OSError: the file cannot be read.
    """
    import gguf

    if path.stat().st_size > _FIRST_KEY:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] == b"GGUF":
                _Header(data).walk()
    return gguf.GGUFReader(path)


class _Header:
    """The keys of a header, gone through without keeping anything."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        # the version is a small number in the order of the file's bytes
        self._order = "<" if struct.unpack_from("<I", data, 4)[0] & 0xFFFF else ">"
        self._at = _FIRST_KEY

    def walk(self) -> None:
        """Go through all keys.

        Raises:
            ValueError: one does not end within the file.
        """
        (keys,) = struct.unpack_from(f"{self._order}Q", self._data, 16)
        for _ in range(keys):
            self._skip(self._number("Q"))
            self._value(self._number("I"), 0)

    def _number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        begin = self._at
        self._skip(size)
        number: int = struct.unpack_from(f"{self._order}{kind}", self._data, begin)[0]
        return number

    def _skip(self, size: int) -> None:
        if size > len(self._data) - self._at:
            msg = f"its header asks for {size} bytes at {self._at}, of {len(self._data)}"
            raise ValueError(msg)
        self._at += size

    def _value(self, kind: int, depth: int) -> None:
        if kind in _WIDTHS:
            return self._skip(_WIDTHS[kind])
        if kind == _STRING:
            return self._skip(self._number("Q"))
        if kind != _ARRAY or depth > _DEEPEST:
            msg = f"its header has a value of type {kind} at {self._at}"
            raise ValueError(msg)
        inner, count = self._number("I"), self._number("Q")
        if count > _MOST:
            msg = f"its header has an array of {count} items at {self._at}"
            raise ValueError(msg)
        if inner in _WIDTHS:
            return self._skip(count * _WIDTHS[inner])
        for _ in range(count):
            self._value(inner, depth + 1)
        return None
