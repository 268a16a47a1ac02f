"""Safetensors shards written as tensors arrive, in the memory of one tensor.

Data goes to a scratch file at once; when a shard is full its header is known, and the final file
is put together from it: widest element types first, then by name, so that every tensor is aligned
and equal tensors give equal bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import torch

from ar_export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}
ELEMENT_TYPES = {name: dtype for dtype, name in _TYPES.items()}
"""Element types of safetensors files, by the name in their headers."""
_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class ShardWriter:
    """Writes tensors into shards in a folder; `close` names the files and writes the index."""

    def __init__(self, folder: Path, *, max_shard_bytes: int) -> None:
        self._folder = folder
        self._limit = max_shard_bytes
        self._scratch: BinaryIO | None = None
        self._entries: list[_Entry] = []
        self._shards: list[tuple[Path, list[str]]] = []
        self._names: set[str] = set()
        self._filled = 0
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor.

        Raises:
            ExportError: a name that was written before, a type safetensors has no name for, or
                the disk refuses.
        """
        if name in self._names:
            msg = f"tensor {name} is written twice"
            raise ExportError(msg)
        if tensor.dtype not in _TYPES:
            msg = f"tensor {name}: safetensors has no element type for {tensor.dtype}"
            raise ExportError(msg)
        plain = tensor.detach().cpu().contiguous()
        size = plain.numel() * plain.element_size()
        with _disk(self._folder):
            if self._entries and self._filled + size > self._limit:
                self._finish_shard()
            if self._scratch is None:
                self._scratch = (self._folder / ".scratch").open("w+b")
            self._scratch.write(_bytes(plain))
        self._entries.append(_Entry(name, plain.dtype, tuple(plain.shape), self._filled, size))
        self._names.add(name)
        self._filled += size
        self.total_bytes += size

    def close(self) -> None:
        """Finish the last shard, give all their final names and write the index if needed.

        Raises:
            ExportError: the disk refuses.
        """
        with _disk(self._folder):
            self._close()

    def discard(self) -> None:
        """Let go of the scratch file."""
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def _close(self) -> None:
        if self._entries:
            self._finish_shard()
        count = len(self._shards)
        if count == 1:
            self._shards[0][0].rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _finish_shard(self) -> None:
        assert self._scratch is not None
        order = sorted(self._entries, key=lambda e: (-e.dtype.itemsize, e.name))
        path = self._folder / f".shard-{len(self._shards):05d}"
        with path.open("wb") as out:
            out.write(_header(order))
            for entry in order:
                self._scratch.seek(entry.start)
                left = entry.size
                while left:
                    chunk = self._scratch.read(min(left, _CHUNK))
                    if not chunk:
                        msg = f"{self._folder}: the scratch file was cut short by someone else"
                        raise ExportError(msg)
                    out.write(chunk)
                    left -= len(chunk)
            out.flush()
            os.fsync(out.fileno())
        self.discard()
        (self._folder / ".scratch").unlink()
        self._shards.append((path, [e.name for e in order]))
        self._entries, self._filled = [], 0


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Say in plain words when the disk is full or gone."""
    try:
        yield
    except OSError as error:
        msg = f"weights cannot be written into {folder}: {error.strerror or error}"
        raise ExportError(msg) from error


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes; torch alone needs numpy for it."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr() if size else 0))


def _header(order: list[_Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in order:
        header[entry.name] = {
            "dtype": _TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.size],
        }
        start += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
