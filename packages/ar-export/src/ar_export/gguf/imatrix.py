"""Importance matrices of llama.cpp: per tensor, the sum of squares of every input channel.

The GGUF form is read and written; the older .dat form is read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_export.errors import ExportError
from ar_export.gguf.opening import open_reader

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Importance:
    """What was seen of the inputs of one weight.

    Attributes:
        sums: float32 [E, I]: sum of squares per input channel; E is 1 but for experts.
        counts: float32 [E]: rows that were seen.
    """

    sums: Tensor
    counts: Tensor

    def mean(self) -> Tensor:
        """Return the mean square per input channel, float32 [E, I]; 1 where nothing was seen."""
        seen = self.counts.unsqueeze(-1)
        return torch.where(seen > 0, self.sums / seen.clamp_min(1), torch.ones_like(self.sums))


@dataclass(frozen=True)
class ImportanceMatrix:
    """An importance matrix: by GGUF name of the weight."""

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 512


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Return the importance matrix in a file.

    Raises:
        ExportError: neither of the two forms, or damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        return _read_gguf(path) if start == _MAGIC else _read_legacy(path.read_bytes())
    except (OSError, ValueError, IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        msg = f"{path} is no whole importance matrix: {error}"
        raise ExportError(msg) from error


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write an importance matrix in the GGUF form."""
    import gguf

    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(matrix.datasets) or ["unknown"])
    writer.add_uint32("imatrix.chunk_count", matrix.chunks)
    writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
    for name, entry in sorted(matrix.entries.items()):
        writer.add_tensor(name + _SUMS, entry.sums.float().contiguous().numpy())
        writer.add_tensor(name + _COUNTS, entry.counts.float().reshape(-1, 1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(path: Path) -> ImportanceMatrix:
    reader = open_reader(path)
    found = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    entries = {}
    for key, sums in found.items():
        if key.endswith(_SUMS):
            name = key.removesuffix(_SUMS)
            width = sums.shape[-1]
            entries[name] = Importance(sums.reshape(-1, width), found[name + _COUNTS].reshape(-1))

    def value(key: str) -> int:
        field = reader.get_field(key)
        return 0 if field is None else int(field.contents())

    sets = reader.get_field("imatrix.datasets")
    names = () if sets is None else tuple(str(s) for s in sets.contents())
    return ImportanceMatrix(
        entries, names, value("imatrix.chunk_count"), value("imatrix.chunk_size")
    )


def _read_legacy(raw: bytes) -> ImportanceMatrix:
    """Read the .dat form: count, then (name, calls, values that are sums / rows * calls)."""
    at = 0

    def number() -> int:
        nonlocal at
        (value,) = struct.unpack_from("<i", raw, at)
        at += 4
        if value < 0 or value > len(raw):
            msg = f"a length of {value} at byte {at - 4}"
            raise ValueError(msg)
        return int(value)

    entries = {}
    for _ in range(number()):
        size = number()
        name = raw[at : at + size].decode()
        at += size
        calls, width = number(), number()
        values = torch.frombuffer(bytearray(raw[at : at + 4 * width]), dtype=torch.float32)
        if len(values) < width:
            msg = f"{name} is cut short"
            raise ValueError(msg)
        at += 4 * width
        entries[name] = Importance(values.reshape(1, -1), torch.tensor([float(calls or 1)]))
    return ImportanceMatrix(entries)
