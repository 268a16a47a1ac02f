"""The CPU kernels against float64, for every representation, instruction set and shape."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from ar_kernels import KernelError, QuantizedWeight, equal
from ar_kernels.backends import Need
from ar_kernels.backends.cpu_native import CpuNative
from ar_kernels.native import library as lib
from ar_kernels.native import packing, storage
from ar_kernels.native.product import expand, experts_linear, linear
from ar_kernels.testing import BackendConformance, quantized
from ar_schemes import Granularity, Span, SuperGroup, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_library = pytest.mark.skipif(
    isinstance(lib.load(), str), reason=f"not built: {lib.BUILD} builds it"
)
CHANNEL, TENSOR = Granularity(Span.CHANNEL), Granularity(Span.TENSOR)
TILE = Granularity(Span.TILE, (16, 32))


def groups(size: int) -> Granularity:
    return Granularity(Span.GROUP, (size,))


INTEGERS = tuple(
    TensorSpec(bits=bits, granularity=granularity, symmetric=symmetric)
    for bits, granularity in (
        (2, groups(16)),
        (2, groups(64)),
        (3, groups(32)),
        (3, CHANNEL),
        (4, groups(128)),
        (4, groups(48)),
        (4, TILE),
        (5, groups(32)),
        (6, groups(96)),
        (7, TENSOR),
        (8, groups(16)),
        (8, CHANNEL),
    )
    for symmetric in (True, False)
)
FLOATS = (
    *(TensorSpec("fp", 8, g, scale_dtype="float32") for g in (CHANNEL, TENSOR, TILE)),
    TensorSpec("fp", 8, CHANNEL, scale_dtype="bfloat16"),
    *(TensorSpec("mx_fp", bits, groups(32), scale_dtype="e8m0") for bits in (4, 6, 8)),
    TensorSpec("mx_fp_rceil", 4, groups(32), scale_dtype="e8m0"),
    TensorSpec("mx_int", 4, groups(32), scale_dtype="e8m0"),
    TensorSpec("nv_fp", 4, groups(16), scale_dtype="float8_e4m3fn"),
    TensorSpec("nvfp4_v2", 4, groups(16), scale_dtype="ue5m3"),
)
SPECS = INTEGERS + FLOATS
ROWS, COLUMNS = 80, 384
"""A strip and a quarter; a multiple of every group above."""
TOLERANCE = {torch.float32: 6e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""||y - expected|| / ||expected||: rounding of y, and for float32 the order of sums: zero points
and products of 8 bit codes are sums of opposite signs."""
NEED = Need(INTEGERS[0], ROWS, COLUMNS, "cpu", torch.float32)


def isas() -> tuple[str, ...]:
    return () if isinstance(lib.load(), str) else lib.supported()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(params=SPECS, ids=str, scope="module")
def weight(request: pytest.FixtureRequest) -> QuantizedWeight:
    return quantized(request.param, ROWS, COLUMNS)


class TestCpuNative(BackendConformance):
    subject = CpuNative()
    specs = SPECS[::2] + FLOATS
    shapes = ((48, 384),)
    refused = (
        replace(NEED, spec=TensorSpec(bits=1)),
        replace(NEED, spec=TensorSpec(granularity=groups(24))),
        replace(NEED, spec=TensorSpec(data_type="unheard_of")),
        replace(NEED, spec=TensorSpec("int_asym_float_zp", 4, groups(32), symmetric=False)),
        replace(NEED, spec=TensorSpec("int_sym_dq", 4, super_group=SuperGroup(8, 6))),
        replace(NEED, dtype=torch.float64),
        replace(NEED, device="cuda"),
        replace(NEED, activation=TensorSpec(bits=8)),
    )


@needs_library
def test_unpack_returns_the_weight(weight: QuantizedWeight) -> None:
    blob, meta = packing.pack(weight)
    assert equal(packing.unpack(blob, meta, weight.spec, weight.extra), weight)


@needs_library
@pytest.mark.parametrize("isa", isas())
def test_expand_returns_the_dequantized_weight(weight: QuantizedWeight, isa: str) -> None:
    blob, meta = packing.pack(weight)
    expected = weight.dequantize(torch.float64)
    for dtype in TOLERANCE:
        found = expand(blob, meta, dtype, isa=isa)
        assert found.shape == weight.shape
        assert error(found, expected) <= min(TOLERANCE[dtype], 4e-3)
    part = expand(blob, meta, torch.float32, 64, 77, isa=isa)
    assert torch.equal(part, expand(blob, meta, torch.float32, isa=isa)[64:77])


@needs_library
@pytest.mark.parametrize("isa", isas())
def test_the_product_is_that_of_the_dequantized_weight(weight: QuantizedWeight, isa: str) -> None:
    blob, meta = packing.pack(weight)
    dense = weight.dequantize(torch.float64).t()
    generator = torch.Generator().manual_seed(3)
    for dtype, bound in TOLERANCE.items():
        for count in (0, 1, 2, 3, 5, 16, 17, 64):
            x = torch.randn(count, COLUMNS, generator=generator).to(dtype)
            bias = torch.randn(ROWS, generator=generator)
            for add in (None, bias):
                found = linear(x, blob, meta, add, isa=isa)
                assert found.dtype == dtype
                expected = x.double() @ dense + (0 if add is None else add.double())
                assert count == 0 or error(found, expected) <= bound, (dtype, count)


def odd_shapes() -> Iterator[tuple[TensorSpec, int, int]]:
    yield TensorSpec(bits=4, granularity=CHANNEL), 1, 1
    yield TensorSpec(bits=4, granularity=CHANNEL), 3, 33
    yield TensorSpec(bits=8, granularity=CHANNEL), 65, 47
    yield TensorSpec(bits=5, granularity=TENSOR, symmetric=False), 17, 95
    yield TensorSpec(bits=3, granularity=groups(16)), 63, 80
    yield TensorSpec(bits=6, granularity=groups(48), symmetric=False), 129, 144
    yield TensorSpec("fp", 8, CHANNEL, scale_dtype="float32"), 31, 50


@needs_library
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(
    ("spec", "rows", "columns"), list(odd_shapes()), ids=lambda v: str(v).replace(" ", "-")
)
def test_features_and_inputs_need_not_fill_blocks(
    spec: TensorSpec, rows: int, columns: int, isa: str
) -> None:
    weight = quantized(spec, rows, columns)
    blob, meta = packing.pack(weight)
    assert equal(packing.unpack(blob, meta, spec, {}), weight)
    dense = weight.dequantize(torch.float64).t()
    for dtype, bound in TOLERANCE.items():
        for count in (1, 3, 9):
            x = torch.randn(count, columns, dtype=torch.float64).to(dtype)
            assert error(linear(x, blob, meta, isa=isa), x.double() @ dense) <= bound


@needs_library
@pytest.mark.parametrize("isa", isas())
def test_rows_may_be_strided_and_results_do_not_depend_on_it(isa: str) -> None:
    blob, meta = packing.pack(quantized(INTEGERS[3], ROWS, COLUMNS))
    wide = torch.randn(6, 2 * COLUMNS + 3, dtype=torch.bfloat16)
    for x in (wide[:, :COLUMNS], wide[::2, 3 : 3 + COLUMNS], wide[:, 1 : 2 * COLUMNS : 2]):
        assert torch.equal(
            linear(x, blob, meta, isa=isa), linear(x.contiguous(), blob, meta, isa=isa)
        )


@needs_library
@pytest.mark.parametrize("count", [1, 16])
def test_threads_do_not_change_a_bit(count: int) -> None:
    blob, meta = packing.pack(quantized(TensorSpec(), 512, 1024))
    x, before = torch.randn(count, 1024), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(linear(x, blob, meta))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_library
def test_rows_do_not_influence_each_other() -> None:
    blob, meta = packing.pack(quantized(TensorSpec(), 128, 256))
    x = torch.randn(40, 256, dtype=torch.bfloat16)
    together = linear(x, blob, meta)
    bound = TOLERANCE[torch.bfloat16]
    for i in (0, 7, 39):
        assert error(linear(x[i : i + 1], blob, meta), together[i : i + 1].double()) <= bound


@needs_library
def test_joined_layers_give_the_products_of_each() -> None:
    weights = [quantized(TensorSpec(), rows, 256, seed=rows) for rows in (128, 64, 72)]
    packed = [packing.pack(w) for w in weights]
    blob, meta = packing.join(packed, experts=False)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    each = torch.cat([linear(x, *one) for one in packed], -1)
    assert torch.equal(linear(x, blob, meta), each)


@needs_library
def test_layers_that_do_not_fill_records_or_differ_are_not_joined() -> None:
    odd = [packing.pack(quantized(TensorSpec(), rows, 256)) for rows in (72, 64)]
    with pytest.raises(KernelError, match="multiples of 64"):
        packing.join(odd, experts=False)
    other = packing.pack(quantized(TensorSpec(bits=3), 64, 256))
    with pytest.raises(KernelError, match="one format"):
        packing.join([odd[1], other], experts=False)


@needs_library
@pytest.mark.parametrize("isa", isas())
def test_experts_get_the_tokens_between_their_offsets(isa: str) -> None:
    weights = [quantized(TensorSpec(), 72, 128, seed=i) for i in range(4)]
    packed = [packing.pack(w) for w in weights]
    blob, meta = packing.join(packed, experts=True)
    x, bias = torch.randn(9, 128), torch.randn(4, 72)
    offsets = torch.tensor([0, 3, 3, 8, 9])
    found = experts_linear(x, blob, meta, offsets, bias, isa=isa)
    for e, one in enumerate(packed):
        part = slice(int(offsets[e]), int(offsets[e + 1]))
        expected = linear(x[part], *one, bias[e], isa=isa)
        assert torch.equal(found[part], expected)


@needs_library
@pytest.mark.parametrize("offsets", [[0, 3], [1, 2, 9], [0, 5, 4], [0, 5, 10]], ids=str)
def test_offsets_that_do_not_divide_the_tokens_are_refused(offsets: list[int]) -> None:
    packed = [packing.pack(quantized(TensorSpec(), 64, 128))] * 2
    blob, meta = packing.join(packed, experts=True)
    with pytest.raises(KernelError, match="offsets"):
        experts_linear(torch.randn(9, 128), blob, meta, torch.tensor(offsets))


@needs_library
def test_a_blob_of_the_wrong_size_and_a_format_that_is_none_are_refused() -> None:
    blob, meta = packing.pack(quantized(TensorSpec(), 64, 128))
    x = torch.randn(1, 128)
    with pytest.raises(KernelError, match="another size"):
        linear(x, blob[:-1], meta)
    for place, value in ((3, 9), (2, 24), (5, 7), (0, 0), (7, 2)):
        wrong = list(meta)
        wrong[place] = value
        with pytest.raises(KernelError, match="native CPU kernel"):
            linear(x, blob, tuple(wrong))
    with pytest.raises(KernelError, match=r"need .* \[\.\.\., 128\]"):
        linear(torch.randn(1, 127), blob, meta)
    with pytest.raises(KernelError, match="float32"):
        linear(x.double(), blob, meta)
    with pytest.raises(KernelError, match="outside"):
        expand(blob, meta, torch.float32, 1, 5)


@needs_library
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_inputs_that_are_not_finite_come_through(dtype: torch.dtype) -> None:
    weight = quantized(TensorSpec(), 64, 128)
    blob, meta = packing.pack(weight)
    x = torch.ones(3, 128, dtype=dtype)
    x[0, 5], x[1, 7] = torch.nan, -torch.inf
    infinite = -torch.inf * weight.dequantize()[:, 7].sign().to(dtype)
    for isa in isas():
        found = linear(x, blob, meta, isa=isa)
        assert found[0].isnan().all()
        if isa == "avx2" and dtype == torch.bfloat16:  # whole numbers have no infinity
            assert not found[1].isfinite().any()
        else:
            assert torch.equal(found[1].nan_to_num(7), infinite.nan_to_num(7))
        assert found[2].isfinite().all()


class _Codebook:
    """A plugin's data type of four bits."""

    name = "book"

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values.float()

    def refuses(self, spec: TensorSpec) -> str | None:
        return None if spec.bits == 4 else "4 bits"

    def codebook(self, spec: TensorSpec) -> torch.Tensor:
        assert spec.data_type == "book"
        return self.values

    def dequantize(self, weight: QuantizedWeight) -> torch.Tensor:
        wide = weight.scale.float().repeat_interleave(32, -1)
        return wide * self.values[weight.codes.int()]


CODEBOOKS = {
    "not in bf16": torch.linspace(-1, 1, 16) ** 3,
    "whole numbers, as far apart as they may be": torch.tensor([0, 31, *range(1, 15)]) * 0.25 - 2,
    "further apart": torch.tensor([-16, *range(15)]) + 1.0,
    "not of the least one": torch.tensor([0, 2, 3, *range(4, 17)]) * 1.0,
    "all one": torch.ones(16),
    "zeros": torch.zeros(16),
    "one that is no number": torch.tensor([float("nan"), *range(15)]),
}


@needs_library
@pytest.mark.parametrize("values", CODEBOOKS.values(), ids=list(CODEBOOKS))
@pytest.mark.parametrize("isa", isas())
def test_any_codebook_of_sixteen_values_runs(
    isa: str, values: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = _Codebook(values)
    monkeypatch.setattr(storage, "_numbers", lambda spec: numbers)
    spec = TensorSpec("book", 4, groups(32))
    assert storage.refuses(spec) is None
    codes = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
    if values.isnan().any():
        codes = codes.clamp(1)
    weight = QuantizedWeight(spec, codes, torch.rand(64, 4).half())
    blob, meta = packing.pack(weight)
    dense = numbers.dequantize(weight).double()
    for dtype, bound in TOLERANCE.items():
        for rows in (1, 3):
            x = torch.randn(rows, 128).to(dtype)
            found, expected = linear(x, blob, meta, isa=isa), x.double() @ dense.t()
            assert (found.double() - expected).norm() <= bound * expected.norm()
    for made in (storage.storage, storage.table, storage.exact_in_bf16):
        made.cache_clear()
