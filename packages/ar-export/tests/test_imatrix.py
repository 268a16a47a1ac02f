from __future__ import annotations

import struct

import pytest
import torch

from ar_export import ExportError
from ar_export.gguf.imatrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix

pytest.importorskip("gguf")
ENTRIES = {
    "blk.0.attn_q.weight": Importance(torch.rand(1, 8), torch.tensor([12.0])),
    "blk.0.ffn_up_exps.weight": Importance(torch.rand(4, 8), torch.tensor([3.0, 0.0, 7.0, 1.0])),
}


def test_what_is_written_comes_back(tmp_path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, ImportanceMatrix(ENTRIES, ("a.txt", "b.txt"), 5, 256))
    found = read_imatrix(path)
    assert (found.datasets, found.chunks, found.chunk_size) == (("a.txt", "b.txt"), 5, 256)
    for name, entry in ENTRIES.items():
        assert torch.equal(found.entries[name].sums, entry.sums)
        assert torch.equal(found.entries[name].counts, entry.counts)


def test_the_mean_is_per_row_and_one_where_nothing_was_seen() -> None:
    mean = ENTRIES["blk.0.ffn_up_exps.weight"].mean()
    assert torch.equal(mean[0], ENTRIES["blk.0.ffn_up_exps.weight"].sums[0] / 3)
    assert (mean[1] == 1).all()


def test_the_older_form_is_read(tmp_path) -> None:
    name = b"blk.0.attn_q.weight"
    raw = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii3f", 2, 3, 1.0, 2.0, 4.0)
    (tmp_path / "old.dat").write_bytes(raw)
    found = read_imatrix(tmp_path / "old.dat").entries[name.decode()]
    assert found.mean().tolist() == [[0.5, 1.0, 2.0]]


@pytest.mark.parametrize("raw", [b"", b"GGUF", b"\xff\xff\xff\x7f", struct.pack("<ii", 1, 90)])
def test_damaged_files_are_refused(tmp_path, raw) -> None:
    (tmp_path / "bad.dat").write_bytes(raw)
    with pytest.raises(ExportError, match="no whole importance matrix"):
        read_imatrix(tmp_path / "bad.dat")
