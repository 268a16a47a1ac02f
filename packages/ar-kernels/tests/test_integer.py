"""The integer data type against a slow oracle that works element by element."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_kernels import KernelError
from ar_kernels.numerics import Params
from ar_kernels.numerics.grouping import expand
from ar_kernels.numerics.integer import Integer, extremes
from ar_kernels.numerics.rounding import SMALLEST_SCALE
from ar_kernels.testing import DataTypeConformance
from ar_schemes import Granularity, Span, TensorSpec

INT = Integer()
GRANULARITIES = (
    Granularity(Span.GROUP, (16,)),
    Granularity(Span.GROUP, (1,)),
    Granularity(Span.CHANNEL),
    Granularity(Span.TENSOR),
    Granularity(Span.TILE, (4, 8)),
)
SPECS = tuple(
    TensorSpec(bits=bits, granularity=granularity, symmetric=symmetric)
    for bits in (2, 5, 8)
    for granularity in GRANULARITIES
    for symmetric in (True, False)
)


class TestInteger(DataTypeConformance):
    subject = INT
    specs = SPECS
    refused = (TensorSpec(bits=1), TensorSpec(bits=9))


class TestIntegerWithBfloat16Scales(DataTypeConformance):
    subject = INT
    specs = (
        TensorSpec(granularity=GRANULARITIES[0], scale_dtype="bfloat16"),
        TensorSpec(granularity=GRANULARITIES[0], scale_dtype="bfloat16", symmetric=False),
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, TensorSpec]:
    """Return a weight and a spec whose granularity divides it."""
    tile_r, tile_c = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rows, columns = tile_r * draw(st.integers(1, 3)), tile_c * draw(st.integers(1, 3))
    granularity = draw(
        st.sampled_from(
            (
                Granularity(Span.GROUP, (tile_c,)),
                Granularity(Span.CHANNEL),
                Granularity(Span.TENSOR),
                Granularity(Span.TILE, (tile_r, tile_c)),
            )
        )
    )
    spec = TensorSpec(
        bits=draw(st.integers(2, 8)), granularity=granularity, symmetric=draw(st.booleans())
    )
    finite = st.floats(-100, 100, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-7])
    values = draw(st.lists(finite, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, columns), spec


def f32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def f16(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32).half())


def oracle(weight: torch.Tensor, spec: TensorSpec) -> tuple[list[list[int]], torch.Tensor]:
    """Return (stored codes, dequantized weight), one region after another, one value at a time."""
    rows, columns = weight.shape
    step_r, step_c = spec.granularity.region(rows, columns)
    codes = [[0] * columns for _ in range(rows)]
    out = torch.empty(rows, columns)
    for top in range(0, rows, step_r):
        for left in range(0, columns, step_c):
            cells = [(r, c) for r in range(top, top + step_r) for c in range(left, left + step_c)]
            values = [float(weight[cell]) for cell in cells]
            scale, zero = scale_and_zero(min([*values, 0.0]), max([*values, 0.0]), spec)
            for (r, c), value in zip(cells, values, strict=True):
                code = round(f32(value / scale)) + zero  # round: half to even, as torch
                code = min(max(code, 0), 2**spec.bits - 1)
                codes[r][c] = code
                out[r, c] = f32(scale * (code - zero))
    return codes, out


def scale_and_zero(low: float, high: float, spec: TensorSpec) -> tuple[float, int]:
    if spec.symmetric:
        peak = 2 ** (spec.bits - 1)
        scale = f32((-high if high >= -low else -low) / peak)
        if abs(scale) < SMALLEST_SCALE:
            scale = -SMALLEST_SCALE if scale < 0 else SMALLEST_SCALE
        return f16(scale), peak
    top = 2**spec.bits - 1
    scale = f16(max(f32(f32(high - low) / top), SMALLEST_SCALE))
    return scale, min(max(round(f32(-low / scale)), 0), top)


@given(problems())
@settings(max_examples=150, deadline=None)
def test_codes_and_values_equal_the_oracle(problem: tuple[torch.Tensor, TensorSpec]) -> None:
    weight, spec = problem
    codes, values = oracle(weight, spec)
    found = INT.quantize(weight, spec, INT.parameters(weight, spec))
    assert found.codes.tolist() == codes
    assert torch.equal(found.dequantize(), values)
    assert torch.equal(INT.fake_quant(weight, spec, INT.parameters(weight, spec)), values)


@given(problems())
@settings(max_examples=100, deadline=None)
def test_error_is_half_a_step_unless_clamped(problem: tuple[torch.Tensor, TensorSpec]) -> None:
    weight, spec = problem
    found = INT.quantize(weight, spec, INT.parameters(weight, spec))
    step = found.scale.float().abs().amax()
    error = (found.dequantize() - weight).abs().amax()
    # symmetric: a value of the other sign as large as the peak loses a whole step at the end;
    # the fp16 rounding of the scale moves the ends by 2**bits half units of its last place
    slack = 1.0 if spec.symmetric else 0.5
    assert error <= step * (slack + 0.5 + 2**spec.bits * 2**-11)


def test_the_largest_magnitude_maps_to_the_lowest_code_with_a_signed_scale() -> None:
    spec = TensorSpec(bits=4, granularity=Granularity(Span.GROUP, (4,)))
    weight = torch.tensor([[0.5, -1.0, 8.0, 3.0], [0.5, -8.0, 1.0, 3.0]])
    found = INT.quantize(weight, spec, INT.parameters(weight, spec))
    assert found.scale.flatten().tolist() == [-1.0, 1.0]
    assert found.codes.tolist() == [[8, 9, 0, 5], [8, 0, 9, 11]]
    assert found.zero_point is None


def test_asymmetric_vector() -> None:
    spec = TensorSpec(bits=2, granularity=Granularity(Span.CHANNEL), symmetric=False)
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    found = INT.quantize(weight, spec, INT.parameters(weight, spec))
    assert found.scale.item() == 1.0
    assert found.zero_point is not None
    assert found.zero_point.item() == 1
    assert found.codes.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_one_element_groups_keep_the_value_to_scale_precision(symmetric: bool) -> None:
    spec = TensorSpec(granularity=Granularity(Span.GROUP, (1,)), symmetric=symmetric)
    weight = torch.linspace(-3, 3, 32).reshape(4, 8)
    fake = INT.fake_quant(weight, spec, INT.parameters(weight, spec))
    assert torch.allclose(fake, weight, rtol=2**-11, atol=SMALLEST_SCALE)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_zeros_stay_zero_with_a_finite_scale(symmetric: bool) -> None:
    spec = TensorSpec(granularity=Granularity(Span.GROUP, (8,)), symmetric=symmetric)
    params = INT.parameters(torch.zeros(2, 16), spec)
    assert (params.scale >= SMALLEST_SCALE).all()
    assert INT.fake_quant(torch.zeros(2, 16), spec, params).abs().max() == 0


def test_a_scale_below_the_smallest_keeps_its_sign() -> None:
    spec = TensorSpec(granularity=Granularity(Span.CHANNEL))
    params = INT.parameters(torch.tensor([[1e-9, 0.0], [-1e-9, 0.0]]), spec)
    smallest = f16(SMALLEST_SCALE)
    assert params.scale.flatten().tolist() == [-smallest, smallest]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_gradient_passes_the_rounding_and_is_zero_where_clamped(symmetric: bool) -> None:
    spec = TensorSpec(bits=2, granularity=Granularity(Span.CHANNEL), symmetric=symmetric)
    zero_point = None if symmetric else torch.tensor([[2.0]])
    params = Params(torch.tensor([[0.5]]), zero_point)
    weight = torch.tensor([[-9.0, -1.0, -0.3, 0.0, 0.2, 0.5, 9.0]], requires_grad=True)
    offset = torch.zeros(1, 7, requires_grad=True)
    INT.fake_quant(weight, spec, params, offset=offset).sum().backward()
    assert weight.grad is not None
    assert offset.grad is not None
    assert weight.grad.tolist() == [[0, 1, 1, 1, 1, 1, 0]]
    assert offset.grad.tolist() == [[0, 0.5, 0.5, 0.5, 0.5, 0.5, 0]]


def test_gradient_of_the_scale_is_code_minus_value_where_free_and_code_where_clamped() -> None:
    spec = TensorSpec(bits=3, granularity=Granularity(Span.CHANNEL))
    scale = torch.tensor([[0.5]], requires_grad=True)
    weight = torch.tensor([[0.6, -0.8, 7.0, -7.0]])
    INT.fake_quant(weight, spec, Params(scale)).sum().backward()
    assert scale.grad is not None
    expected = (1 - 0.6 / 0.5) + (-2 + 0.8 / 0.5) + 3 - 4
    assert math.isclose(scale.grad.item(), expected, rel_tol=1e-5)


def test_clip_factors_shrink_the_range_before_the_scale_is_computed() -> None:
    spec = TensorSpec(bits=4, granularity=Granularity(Span.CHANNEL), symmetric=False)
    weight = torch.tensor([[-2.0, 0.0, 1.0, 3.0]])
    half = torch.full((1, 1), 0.5)
    clipped = INT.parameters(weight, spec, low=half, high=half)
    direct = INT.parameters(weight / 2, spec)
    assert torch.equal(clipped.scale, direct.scale)
    assert clipped.zero_point is not None
    assert direct.zero_point is not None
    assert torch.equal(clipped.zero_point, direct.zero_point)


def test_rescale_multiplies_scales_and_keeps_zero_points() -> None:
    spec = TensorSpec(granularity=Granularity(Span.CHANNEL), symmetric=False)
    params = INT.parameters(torch.tensor([[-2.0, 5.5], [1.0, 2.0]]), spec)
    scaled = INT.rescale(params, spec, torch.tensor([[0.9], [1.1]]))
    expected = (params.scale * torch.tensor([[0.9], [1.1]])).half().float()
    assert torch.equal(scaled.scale, expected)
    assert scaled.zero_point is params.zero_point


def test_extremes_include_zero() -> None:
    spec = TensorSpec(granularity=Granularity(Span.CHANNEL))
    low, high = extremes(torch.tensor([[2.0, 3.0], [-3.0, -2.0]]), spec)
    assert low.flatten().tolist() == [0, -3]
    assert high.flatten().tolist() == [3, 0]


def test_nan_is_refused_with_the_count() -> None:
    spec = TensorSpec(granularity=Granularity(Span.CHANNEL))
    weight = torch.tensor([[1.0, float("nan"), float("inf")]])
    with pytest.raises(KernelError, match="2 NaN or infinite"):
        INT.quantize(weight, spec, INT.parameters(weight, spec))


def test_a_weight_too_large_for_its_scale_type_is_refused_with_the_magnitude() -> None:
    spec = TensorSpec(granularity=Granularity(Span.CHANNEL))
    weight = torch.tensor([[1.0, 1e7]])
    with pytest.raises(KernelError, match=r"1e\+07 needs a scale beyond the range of float16"):
        INT.quantize(weight, spec, INT.parameters(weight, spec))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("size", [16, -1, 0, (4, 16)], ids=["group", "channel", "tensor", "tile"])
def test_gradients_are_those_of_the_single_operations(symmetric, size) -> None:
    kind = Integer()
    spec = TensorSpec(bits=2, granularity=Granularity.from_group_size(size), symmetric=symmetric)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(8, 32, generator=generator)
    shape = spec.granularity.scale_shape(8, 32)
    incoming = torch.randn(8, 32, generator=generator)

    def gradients(fake_quant):
        leaves = [
            (0.3 * torch.randn(8, 32, generator=torch.Generator().manual_seed(5))),
            torch.full(shape, 0.8),
            torch.full(shape, 0.7),
            weight.clone(),
        ]
        offset, low, high, w = (leaf.requires_grad_() for leaf in leaves)
        params = kind.parameters(weight, spec, low=low, high=high)
        out = fake_quant(w, params, offset)
        (out * incoming).sum().backward()
        return out.detach(), [leaf.grad for leaf in (offset, low, high, w)]

    def by_single_operations(w, params, offset):
        codes, _ = kind._codes(w, spec, params, offset)
        return expand(params.scale, (8, 32), spec.granularity) * codes

    out, found = gradients(lambda w, p, o: kind.fake_quant(w, spec, p, offset=o))
    expected_out, expected = gradients(by_single_operations)
    assert torch.equal(out, expected_out)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)
