"""A row of bf16 times integers, or values that are whole numbers: inputs become whole too."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from ar_kernels.native import library as lib
from ar_kernels.native import packing
from ar_kernels.native.product import linear
from ar_kernels.testing import quantized
from ar_schemes import Granularity, Span, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from ar_kernels import QuantizedWeight

    Product = Callable[[torch.Tensor, QuantizedWeight], torch.Tensor]

pytestmark = pytest.mark.skipif(
    isinstance(lib.load(), str), reason=f"not built: {lib.BUILD} builds it"
)
ROWS, SEGMENT, MOST_ROWS = 80, 128, 32
GROUPS = {size: Granularity(Span.GROUP, (size,)) for size in (16, 32, 96, 128, 256)}
SPECS = (
    *(
        TensorSpec(bits=bits, granularity=granularity, symmetric=symmetric)
        for bits in (2, 3, 4, 5, 6, 8)
        for granularity in (*GROUPS.values(), Granularity(Span.CHANNEL))
        for symmetric in (True, False)
    ),
    *(TensorSpec(f"mx_{kind}", 4, GROUPS[32], scale_dtype="e8m0") for kind in ("fp", "int")),
    TensorSpec("nv_fp", 4, GROUPS[16], scale_dtype="float8_e4m3fn"),
    TensorSpec("nvfp4_v2", 4, GROUPS[16], scale_dtype="ue5m3"),
)
CASES = tuple(
    (spec, columns)
    for spec in SPECS
    for columns in (768, 784, 800)
    if spec.granularity.span is Span.CHANNEL or columns % spec.granularity.size[0] == 0
)


def isas() -> list[str]:
    found = () if isinstance(lib.load(), str) else lib.supported()
    return [isa for isa in found if isa != "portable"]


@pytest.fixture(params=isas())
def product(request: pytest.FixtureRequest) -> Product:
    return lambda x, weight: linear(x, *packing.pack(weight), isa=request.param)


def allowed(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """Return how far each output may be off before it is rounded, float64 [O].

    Inputs are off by 2^-15 of the largest of their segment, at 3 bits half of them by twice that.
    A weight without zero point in the middle adds what its zero point does.
    """
    spec = weight.spec
    size = spec.granularity.size[0] if spec.granularity.span is Span.GROUP else x.shape[-1]
    half = 2 ** (spec.bits - 1)
    ends = [
        replace(weight, codes=torch.full_like(weight.codes, code)).dequantize(torch.float64).abs()
        for code in (0, half - 1, half, 2 * half - 1)  # one of which stands for the largest value
    ]
    most = 2 * torch.stack(ends).amax(0)
    off = torch.zeros(x.shape[-1], dtype=torch.float64)
    for group in range(0, x.shape[-1], size):
        for begin in range(group, min(group + size, x.shape[-1]), SEGMENT):
            end = min(begin + SEGMENT, group + size, x.shape[-1])
            off[begin:end] = x[0, begin:end].double().abs().max()
    return most @ off * 2.0 ** (-14 if spec.bits == 3 else -15)


@pytest.mark.parametrize(("spec", "columns"), CASES, ids=str)
def test_inputs_of_very_different_sizes(spec: TensorSpec, columns: int, product: Product) -> None:
    torch.manual_seed(0)
    weight = quantized(spec, ROWS, columns)
    sizes = 2.0 ** torch.randint(-24, 8, (1, columns))
    x = (torch.randn(1, columns) * sizes).bfloat16()
    expected = (x.double() @ weight.dequantize(torch.float64).t())[0]
    off = (product(x, weight)[0].double() - expected).abs()
    assert (off <= allowed(x, weight) + 2.0**-8 * expected.abs()).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_inputs_near_the_largest_are_exact(bits: int, product: Product) -> None:
    spec = TensorSpec(bits=bits, granularity=GROUPS[128], symmetric=False)
    weight = quantized(spec, ROWS, 512)
    torch.manual_seed(1)
    steps = torch.randint(-127, 128, (1, 512)) * torch.randint(1, 32, (1, 512))
    x = (steps.bfloat16() / 64).clamp(-31, 31)
    expected = x.double() @ weight.dequantize(torch.float64).t()
    torch.testing.assert_close(product(x, weight).double(), expected, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-30, 1.9921875, -1.9921875, 1e30])
def test_rows_of_one_value(bits: int, value: float, product: Product) -> None:
    weight = quantized(TensorSpec(bits=bits, granularity=GROUPS[32], symmetric=False), ROWS, 96)
    x = torch.full((1, 96), value).bfloat16()
    expected = x.double() @ weight.dequantize(torch.float64).t()
    off = (product(x, weight).double() - expected).abs()
    # the smallest unit is 2^-111: what is below half of it is taken for zero
    assert (off <= 2.0**-8 * expected.abs() + allowed(x, weight) + 1e-31).all()


@pytest.mark.skipif("avx2" not in isas(), reason="the processor lacks AVX2")
@pytest.mark.parametrize("rows", [2, 3, 5, 6, 7, 31, 32, 33])
@pytest.mark.parametrize("spec", SPECS[::5] + SPECS[-4:], ids=str)
def test_a_row_among_others_is_the_row_alone(spec: TensorSpec, rows: int) -> None:
    weight = quantized(spec, ROWS, 768)
    blob, meta = packing.pack(weight)
    x = torch.randn(rows, 768, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = linear(x, blob, meta, isa="avx2")
    alone = torch.cat([linear(row[None], blob, meta, isa="avx2") for row in x])
    exact = x.double() @ weight.dequantize(torch.float64).t()
    if rows <= MOST_ROWS:
        assert torch.equal(found, alone)
    else:
        assert (found.double() - exact).norm() <= 4e-3 * exact.norm()


def test_rows_that_are_apart_in_memory() -> None:
    weight = quantized(TensorSpec(bits=4, granularity=GROUPS[32]), ROWS, 96)
    blob, meta = packing.pack(weight)
    wide = torch.randn(5, 160, generator=torch.Generator().manual_seed(4)).bfloat16()
    for isa in isas():
        apart = linear(wide[:, 64:], blob, meta, isa=isa)
        assert torch.equal(apart, linear(wide[:, 64:].contiguous(), blob, meta, isa=isa))


def test_what_is_not_finite_is_seen(product: Product) -> None:
    weight = quantized(TensorSpec(bits=4, granularity=GROUPS[32]), ROWS, 96)
    for bad in (float("inf"), float("-inf"), float("nan")):
        x = torch.ones(1, 96).bfloat16()
        x[0, 50] = bad
        assert not product(x, weight).isfinite().any()


def test_instruction_sets_give_the_same_bits() -> None:
    weight = quantized(TensorSpec(bits=3, granularity=GROUPS[128], symmetric=False), ROWS, 512)
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = [linear(x, *packing.pack(weight), isa=isa) for isa in isas()]
    assert all(torch.equal(one, found[0]) for one in found)
