"""Weights in large pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.native import arena

if TYPE_CHECKING:
    import pytest


def test_copies_lie_one_behind_the_other_and_hold_the_same() -> None:
    given = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in (1, 64, 1000, 0, 4096)]
    found = arena.settled(given)
    assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    assert len({one.untyped_storage().data_ptr() for one in found}) == 1
    assert all(one.data_ptr() % 64 == 0 for one in found)
    assert found[0].data_ptr() % arena.PAGE == 0


def test_more_than_a_chunk_is_more_than_one_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "CHUNK", 128)
    found = arena.settled([torch.ones(100, dtype=torch.uint8) for _ in range(4)])
    assert [int(one.sum()) for one in found] == [100] * 4
    assert len({one.untyped_storage().data_ptr() for one in found}) == 4


def test_without_advice_the_memory_serves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_madvise", lambda: None)
    made = arena.large_pages(arena.PAGE + 5)
    assert made.numel() == arena.PAGE + 5
    assert not made.fill_(0).any()


def test_no_weights_need_no_memory() -> None:
    assert arena.settled([]) == []
