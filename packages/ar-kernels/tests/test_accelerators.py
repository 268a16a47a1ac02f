"""What the backends of accelerators say of themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ar_kernels.backends import Backend, ExactBackend, Need
from ar_kernels.backends.accelerators import ACCELERATORS
from ar_kernels.backends.support import Declares
from ar_schemes import Granularity, Span, TensorSpec, scheme

NAMES = ("W2A16", "W3A16", "W4A16", "W8A16", "FPW8A16", "FP8_BLOCK", "FP8_STATIC")
NAMES += ("MXFP4", "MXFP6", "MXFP8", "MXINT4", "NVFP4", "INT8", "GGUF:Q4_K_S")
SPANS = (
    Granularity(Span.GROUP, (16,)),
    Granularity(Span.GROUP, (24,)),
    Granularity(Span.GROUP, (64,)),
    Granularity(Span.CHANNEL),
    Granularity(Span.TILE, (32, 32)),
)


def needs(device: str) -> list[Need]:
    found = []
    for name in NAMES:
        made = scheme(name)
        assert made.weight is not None
        for activation in {None, made.activation}:
            found.append(Need(made.weight, 256, 768, device, torch.bfloat16, activation))
    for bits in range(2, 9):
        for span in SPANS:
            spec = TensorSpec(bits=bits, granularity=span, symmetric=bits % 2 == 0)
            found.append(Need(spec, 256, 768, device, torch.bfloat16))
    kinds = (torch.float16, torch.float32, torch.float64)
    return found + [replace(need, dtype=kind) for need in found for kind in kinds]


@pytest.mark.parametrize("backend", ACCELERATORS, ids=lambda b: b.name)
def test_the_table_lists_whatever_the_backend_takes(backend: Backend) -> None:
    assert isinstance(backend, Declares)
    (device,) = backend.support.devices
    taken = [need for need in needs(device) if backend.refuses(need) is None]
    assert taken
    assert [need for need in taken if backend.support.refuses(need) is not None] == []
    assert backend.refuses(replace(taken[0], device="tpu")) is not None


@pytest.mark.parametrize("backend", ACCELERATORS, ids=lambda b: b.name)
def test_what_was_never_run_says_so(backend: Backend) -> None:
    assert backend.keeps_codes == isinstance(backend, ExactBackend)
    if backend.name != "ark":
        assert "never run" in backend.status
        assert not backend.status.startswith("verified")


@pytest.mark.parametrize("backend", ACCELERATORS, ids=lambda b: b.name)
def test_where_its_device_is_not_it_is_missing(backend: Backend) -> None:
    assert isinstance(backend, Declares)
    (device,) = backend.support.devices
    module = getattr(torch, device, None)
    if module is not None and module.is_available():
        pytest.skip(f"there is a {device} here")
    assert backend.missing() is not None


def test_names_and_ranks_are_unlike() -> None:
    for device in ("cuda", "xpu", "cpu", "hpu"):
        ranks = [b.priority for b in ACCELERATORS if device in b.support.devices]
        assert len(ranks) == len(set(ranks))
    assert len({b.name for b in ACCELERATORS}) == len(ACCELERATORS)
