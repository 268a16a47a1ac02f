"""Memory given back while a checkpoint is repacked."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from ar_kernels.hf.memory import Returning, _pages

if TYPE_CHECKING:
    from collections.abc import Iterator

safetensors = pytest.importorskip("safetensors")
storing = pytest.importorskip("safetensors.torch")
PAGE = 4096
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[torch.Tensor]:
    """Write a file of 32 MB and give the tensor that is mapped from it."""
    storing.save_file({"a": torch.arange(2**23, dtype=torch.int32)}, path)
    with safetensors.safe_open(str(path), framework="pt") as file:
        yield file.get_slice("a")[...]


@linux
def test_pages_of_a_mapped_file_go_and_come_back(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    with mapped(path) as tensor:
        total = int(tensor.sum(dtype=torch.int64))  # touches every page
        before = resident("RssFile")
        Returning([path]).done_with([tensor])
        assert before - resident("RssFile") > tensor.nbytes * 0.9
        assert int(tensor.sum(dtype=torch.int64)) == total


@linux
def test_a_tensor_that_stays_gives_back_only_what_nobody_wrote(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    with mapped(path) as tensor:
        total = int(tensor.sum(dtype=torch.int64))
        give_back = Returning([path]).seldom_read(tensor)
        before = resident("RssFile")
        for part in tensor.split(2**21):
            give_back(part)
        assert before - resident("RssFile") > tensor.nbytes * 0.9
        assert int(tensor.sum(dtype=torch.int64)) == total
        tensor[5] += 1
        Returning([path]).seldom_read(tensor)(tensor)
        assert int(tensor.sum(dtype=torch.int64)) == total + 1


@linux
def test_memory_that_is_no_file_of_the_checkpoint_stays(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    storing.save_file({"a": torch.ones(2**23, dtype=torch.int32)}, path)
    mine = torch.ones(2**23, dtype=torch.int32)
    with safetensors.safe_open(str(path), framework="pt") as file:
        tensor = file.get_slice("a")[...]
        tensor.sum()
        before = resident("RssFile")
        Returning([tmp_path / "b.safetensors"]).done_with([mine, tensor])
        assert resident("RssFile") > before - 2**20
    assert bool((mine == 1).all())


def test_only_whole_pages_inside_files_are_given_back() -> None:
    files = [(10 * PAGE, 20 * PAGE)]
    assert _pages([(11 * PAGE - 5, 13 * PAGE + 5)], files) == [(11 * PAGE, 13 * PAGE)]
    assert _pages([(11 * PAGE + 5, 12 * PAGE - 5)], files) == []
    assert _pages([(19 * PAGE, 21 * PAGE)], files) == []
