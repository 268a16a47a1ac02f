"""torch's int4 and int8 products on CPUs."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from ar_kernels.backends import Need
from ar_kernels.backends import cpu_aten as module
from ar_kernels.backends.cpu_aten import CpuAten
from ar_kernels.testing import BackendConformance, quantized
from ar_schemes import Granularity, Span, TensorSpec

SPECS = tuple(
    TensorSpec(bits=bits, granularity=granularity, symmetric=symmetric)
    for bits in (2, 3, 4, 8)
    for granularity in (Granularity(Span.GROUP, (32,)), Granularity(Span.CHANNEL))
    for symmetric in (True, False)
)
NEED = Need(SPECS[0], 32, 64, "cpu", torch.bfloat16)


class TestCpuAten(BackendConformance):
    subject = CpuAten()
    specs = SPECS
    shapes = ((32, 64), (40, 192))
    dtypes = (torch.bfloat16, torch.float16)
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 8e-3}  # noqa: RUF012 - as the base has it
    refused = (
        replace(NEED, spec=TensorSpec(bits=5)),
        replace(NEED, spec=TensorSpec(data_type="mx_fp", scale_dtype="e8m0")),
        replace(NEED, spec=TensorSpec(granularity=Granularity(Span.GROUP, (16,)))),
        replace(NEED, spec=TensorSpec(granularity=Granularity(Span.TENSOR))),
        replace(NEED, spec=TensorSpec(granularity=Granularity(Span.CHANNEL)), columns=48),
        replace(NEED, dtype=torch.float32),
        replace(NEED, device="cuda"),
        replace(NEED, activation=TensorSpec(bits=8)),
    )


@pytest.mark.parametrize("size", [96, 512, 320])
def test_groups_of_other_sizes_repeat_their_scales(size: int) -> None:
    spec = TensorSpec(granularity=Granularity(Span.GROUP, (size,)), symmetric=False)
    need = replace(NEED, spec=spec, columns=2 * size)
    found = quantized(spec, 32, 2 * size)
    packed = CpuAten().pack(found, need)
    x = torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ found.dequantize(torch.float64).t()
    error = (CpuAten().linear(x.bfloat16(), packed, None).double() - expected).norm()
    assert error / expected.norm() < 8e-3


def test_rows_beyond_a_chunk_come_back_in_order(monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 64)
    codes = torch.randint(0, 16, (200, 64), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(module._unpacked(module._packed(codes), 200, 64), codes)


def test_low_widths_are_as_exact_as_four_bits() -> None:
    """A zero point far from the op's own would cost ten times the error."""
    spec = replace(SPECS[0], symmetric=True)
    need = replace(NEED, rows=64, columns=512)
    found = quantized(spec, 64, 512)
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.double() @ found.dequantize(torch.float64).t()
    error = (CpuAten().linear(x, CpuAten().pack(found, need), None).double() - expected).norm()
    assert error / expected.norm() < 3.5e-3


def test_float16_is_cast_and_that_is_said_once(caplog) -> None:
    module._tell_once.cache_clear()
    need = replace(NEED, dtype=torch.float16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            CpuAten().pack(quantized(need.spec, 32, 64), need)
    assert [r.message.startswith("cpu_aten computes float16") for r in caplog.records] == [True]
