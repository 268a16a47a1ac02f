"""Weights in large pages."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from ar_kernels import QuantLinear, data_type
from ar_kernels.hf import decoding
from ar_kernels.native import arena, library
from ar_schemes import TensorSpec


def test_copies_lie_one_behind_the_other_and_hold_the_same() -> None:
    given = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in (1, 64, 1000, 0, 4096)]
    region = arena.Region(sum(map(arena.room_of, given)))
    found = []
    for one in given:
        assert region.fits(one)
        found.append(region.take(one))
    assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    places = [one.data_ptr() for one in found if one.numel()]
    assert places == [places[0] + at for at in (0, 64, 128, 1152)]
    assert places[0] % arena.PAGE == 0
    assert [one.untyped_storage().nbytes() for one in found] == [1, 64, 1000, 0, 4096]
    assert not region.fits(given[0])
    assert region.fits(given[3])


def test_without_advice_the_memory_serves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_madvise", lambda: None)
    made = arena.large_pages(arena.PAGE + 5)
    assert made.numel() == arena.PAGE + 5
    assert not made.fill_(0).any()


@pytest.mark.skipif(library.missing() is not None, reason="the native library is not built")
@pytest.mark.parametrize("region", [1, 9000, 1 << 20])
def test_layers_move_into_regions(monkeypatch: pytest.MonkeyPatch, region: int) -> None:
    monkeypatch.setattr(arena, "REGION", region)
    monkeypatch.setattr(decoding, "_EVERY", 6000)
    spec, numbers = TensorSpec(bits=4), data_type("int")
    model = nn.ModuleList()
    for rows in (64, 128, 192):
        weight = torch.randn(rows, 128)
        held = numbers.quantize(weight, spec, numbers.parameters(weight, spec))
        model.append(QuantLinear.from_weight(held, layout="gptq", dtype=torch.float32))
        model[-1].prepare("cpu_native")
    x = torch.randn(2, 128)
    before = [layer(x) for layer in model]
    decoding._settle(model)
    gc.collect()  # the region itself is gone, its memory must not be
    blobs = [layer.packed_blob() for layer in model]
    starts = sum(blob.data_ptr() % arena.PAGE == 0 for blob in blobs)
    assert starts == {1: 3, 9000: 3, 1 << 20: 1}[region]
    assert all(torch.equal(layer(x), out) for layer, out in zip(model, before, strict=True))
