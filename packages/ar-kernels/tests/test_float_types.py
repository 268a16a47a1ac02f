from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ar_kernels import KernelError, data_type, equal
from ar_kernels.numerics.activation import fake_quant_activation, static_scale
from ar_kernels.numerics.elements import E2M1, E2M3, E3M2, E4M3, INT4, UE5M3
from ar_kernels.numerics.fp8 import Fp8
from ar_kernels.numerics.integer import Integer
from ar_kernels.numerics.mx import Microscaling
from ar_kernels.numerics.nvfp4 import NvFp4, NvFp4E5M3
from ar_kernels.testing.data_types import DataTypeConformance
from ar_schemes import Granularity, Span, TensorSpec, scheme

ml_dtypes = pytest.importorskip("ml_dtypes")
FLOATS = {
    "float4_e2m1fn": E2M1,
    "float6_e2m3fn": E2M3,
    "float6_e3m2fn": E3M2,
    "float8_e4m3fn": E4M3,
}


def spec_of(name: str) -> TensorSpec:
    found = scheme(name).weight
    assert found is not None
    return found


class _Floats(DataTypeConformance):
    shape = (128, 256)


class TestMxFp(_Floats):
    subject = Microscaling("mx_fp")
    specs = (spec_of("MXFP4"), spec_of("MXFP6"), spec_of("MXFP8"))
    refused = (spec_of("MXFP4").with_(bits=5), spec_of("MXFP4").with_(symmetric=False))

    def as_stored(self, params, spec):
        return params.scale.to(torch.float8_e8m0fnu).float()


class TestMxFpRceil(TestMxFp):
    subject = Microscaling("mx_fp_rceil")
    specs = (spec_of("MXFP4").with_(data_type="mx_fp_rceil"),)


class TestMxInt(TestMxFp):
    subject = Microscaling("mx_int")
    specs = (spec_of("MXINT4"),)


class TestNvFp4(_Floats):
    subject = NvFp4("nv_fp")
    specs = (spec_of("NVFP4"),)
    refused = (spec_of("NVFP4").with_(bits=8), spec_of("NVFP4").with_(scale_dtype="float16"))

    def as_stored(self, params, spec):
        return (
            params.extra["block_scale"].to(torch.float8_e4m3fn).float()
            / params.extra["global_scale"]
        )


class TestNvFp4E5M3(_Floats):
    subject = NvFp4E5M3()
    specs = (spec_of("NVFP4_E5M3"),)

    def as_stored(self, params, spec):
        return UE5M3.decode(UE5M3.encode(params.scale))


class TestFp8(_Floats):
    subject = Fp8()
    specs = (
        *(spec_of(name) for name in ("FPW8A16", "FP8_STATIC", "FP8_BLOCK")),
        spec_of("FP8_STATIC").with_(scale_dtype="bfloat16"),
    )
    refused = (spec_of("FP8_STATIC").with_(bits=4),)


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_and_codes_are_those_of_ml_dtypes(name) -> None:
    element, kind = FLOATS[name], getattr(ml_dtypes, name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=generator) * element.maximum / 2
    x = torch.cat([x, x * 1e-2, x * 1e-3, torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    x = x.clamp(-element.maximum, element.maximum)
    theirs = x.numpy().astype(kind)
    values = element.round(x)
    assert torch.equal(values, torch.from_numpy(theirs.astype("float32")))
    assert torch.equal(element.encode(values), torch.from_numpy(theirs.view("uint8")))
    assert torch.equal(element.decode(element.encode(values)), values)


@pytest.mark.parametrize("element", [*FLOATS.values(), UE5M3, INT4], ids=repr)
def test_ties_go_to_even_codes_and_the_rest_to_the_nearest(element) -> None:
    values = sorted(
        {
            float(v)
            for v in element.decode(torch.arange(16, dtype=torch.uint8))
            if math.isfinite(v) and v >= 0
        }
    )
    codes = {float(v): int(element.encode(torch.tensor([v]))) for v in values}
    for low, high in zip(values[:-1], values[1:], strict=True):
        middle = (low + high) / 2
        even = low if codes[low] % 2 == 0 else high
        assert float(element.round(torch.tensor(middle))) == even
        assert float(element.round(torch.tensor(middle * 0.99 + low * 0.01))) == low
        assert float(element.round(torch.tensor(middle * 0.99 + high * 0.01))) == high


def test_elements_saturate() -> None:
    for element in (*FLOATS.values(), INT4):
        big = element.round(torch.tensor([1e30, -1e30]))
        assert big.tolist() == [element.maximum, -element.maximum]
    assert UE5M3.round(torch.tensor([1e30, -1.0])).tolist() == [114688.0, 0.0]


def test_the_published_vector_of_e2m1() -> None:
    x = torch.tensor([0.5, -6, 1.25, 2.5, -0.2, 3.5, 5.0, 0.75])
    assert E2M1.encode(E2M1.round(x)).tolist() == [1, 15, 2, 4, 8, 6, 6, 2]


def test_every_code_of_ue5m3() -> None:
    codes = torch.arange(255, dtype=torch.uint8)
    values = UE5M3.decode(codes)
    assert torch.equal(UE5M3.encode(values), codes)
    for code in range(255):
        power, fraction = divmod(code, 8)
        wanted = fraction / 8 * 2**-14 if power == 0 else (1 + fraction / 8) * 2.0 ** (power - 15)
        assert float(values[code]) == wanted


@pytest.mark.parametrize(
    ("amax", "floor4", "ceil4", "floor8", "ceil8"),
    [
        (6.0, 127, 127, 121, 121),
        (7.0, 127, 128, 121, 121),
        (8.0, 128, 128, 122, 122),
        (1.0, 125, 125, 119, 119),
        (448.0, 133, 134, 127, 127),
        (449.0, 133, 134, 127, 128),
    ],
)
def test_the_shared_exponent(amax, floor4, ceil4, floor8, ceil8) -> None:
    weight = torch.zeros(1, 32)
    weight[0, 3] = -amax
    for name, kind, byte in (
        ("MXFP4", "mx_fp", floor4),
        ("MXFP4", "mx_fp_rceil", ceil4),
        ("MXFP8", "mx_fp", floor8),
        ("MXFP8", "mx_fp_rceil", ceil8),
    ):
        spec = spec_of(name).with_(data_type=kind)
        made = data_type(kind).quantize(weight, spec, data_type(kind).parameters(weight, spec))
        assert int(made.scale.view(torch.uint8)) == byte, (name, kind)


def slow_mx4(row: list[float]) -> list[float]:
    """One block of MXFP4, number by number."""
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    largest = max(abs(v) for v in row)
    scale = 1.0 if largest == 0 else 2.0 ** max(-127, math.frexp(largest)[1] - 1 - 2)
    out = []
    for v in row:
        x = min(abs(v) / scale, 6.0)
        best = min(range(8), key=lambda i: (abs(grid[i] - x), i % 2))
        out.append(math.copysign(grid[best] * scale, v))
    return out


numbers = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, -0.0, 1e-38, 1e-45, 6.0, 0.25])


@settings(max_examples=40, deadline=None)
@given(st.lists(numbers, min_size=32, max_size=32))
def test_mxfp4_is_the_slow_obvious_computation(row) -> None:
    spec, kind = spec_of("MXFP4"), data_type("mx_fp")
    weight = torch.tensor([row], dtype=torch.float32)
    made = kind.quantize(weight, spec, kind.parameters(weight, spec)).dequantize()
    assert made.tolist() == [slow_mx4(weight[0].tolist())]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["MXFP4", "MXFP6", "MXFP8", "MXINT4", "NVFP4", "NVFP4_E5M3", "FP8_STATIC"]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(-120, 100),
    st.integers(0, 2**31),
)
def test_codes_stand_for_the_fake_quantized_weight(name, rows, groups, power, seed) -> None:
    spec = spec_of(name)
    kind = data_type(spec.data_type)
    weight = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed))
    weight = weight * 2.0**power
    for params in (kind.parameters(weight, spec), kind.search(weight, spec)):
        made = kind.quantize(weight, spec, params)
        assert torch.equal(made.dequantize(), kind.fake_quant(weight, spec, params))
        assert torch.isfinite(made.dequantize()).all()
        assert equal(made, type(made).from_tensors(spec, made.tensors()))


@pytest.mark.parametrize("rows", [1, 5])
def test_nvfp4_is_that_of_compressed_tensors(rows) -> None:
    ct = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16
    )
    spec, kind = spec_of("NVFP4"), data_type("nv_fp")
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    made = kind.quantize(weight, spec, kind.parameters(weight, spec))
    theirs = ct.fake_quantize(
        weight,
        scale=made.scale.float(),
        zero_point=None,
        args=args,
        global_scale=made.extra["global_scale"].reshape(1),
    )
    assert torch.allclose(made.dequantize(), theirs, rtol=1e-6, atol=0)


def test_fp8_is_torchs_own_cast() -> None:
    spec, kind = spec_of("FP8_STATIC"), data_type("fp")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    made = kind.quantize(weight, spec, kind.parameters(weight, spec))
    scale = weight.abs().amax(1, keepdim=True) / 448
    assert torch.equal(made.scale, scale)
    assert torch.equal(made.dequantize(), (weight / scale).to(torch.float8_e4m3fn).float() * scale)


def test_members_of_a_fused_group_share_the_scale_of_the_largest() -> None:
    kind, spec = data_type("nv_fp"), spec_of("NVFP4")
    small, big = torch.randn(4, 32), torch.randn(8, 32) * 9
    shared = kind.shared([small, big], spec)
    assert float(shared["global_scale"]) == pytest.approx(2688 / float(big.abs().max()))
    for weight in (small, big):
        params = kind.parameters(weight, spec, shared=shared)
        made = kind.quantize(weight, spec, params)
        assert torch.equal(made.extra["global_scale"], shared["global_scale"])
    assert data_type("int").shared([small], spec_of("W4A16")) == {}


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4", "NVFP4_E5M3", "FP8_STATIC", "MXINT4"])
def test_nothing_but_numbers_is_quantized(name) -> None:
    spec = spec_of(name)
    kind = data_type(spec.data_type)
    for bad in (math.nan, math.inf):
        weight = torch.ones(2, 32)
        weight[1, 2] = bad
        with pytest.raises(KernelError, match="NaN or infinite"):
            kind.quantize(weight, spec, kind.parameters(weight, spec))


TOKEN = Granularity(Span.TOKEN)


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8_RCEIL", "NVFP4", "INT8", "INT4", "FP8_BLOCK"])
def test_dynamic_activations_have_scales_of_their_own_and_gradients(name) -> None:
    spec = scheme(name).activation
    x = torch.randn(3, 4, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = fake_quant_activation(x, spec)
    assert out.shape == x.shape
    assert not torch.equal(out, x)
    assert (out - x).abs().max() < 0.3 * x.abs().max()
    out.sum().backward()
    assert x.grad is not None
    assert ((x.grad == 0) | (x.grad == 1)).all()
    alone = fake_quant_activation(x[:1, :1].detach(), spec)
    if name != "NVFP4":  # whose tensor scale spans all tokens when it is not collected beforehand
        assert torch.equal(alone, out[:1, :1])


def test_int8_per_token_is_the_slow_obvious_computation() -> None:
    x = torch.tensor([[1.0, -2.54, 0.5, 0.01], [0.0, 0.0, 0.0, 0.0]])
    spec = TensorSpec("int", 8, TOKEN, scale_dtype="float32")
    step = 2.54 / 128
    wanted = [min(127, max(-128, round(v / step))) * step for v in (1.0, -2.54, 0.5, 0.01)]
    out = fake_quant_activation(x, spec)
    assert out[0].tolist() == pytest.approx(wanted)
    assert out[1].tolist() == [0.0] * 4


def test_static_ranges() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    fp8 = scheme("FP8_STATIC").activation
    step = static_scale(x.abs().max(), fp8)
    assert float(step) == pytest.approx(float(x.abs().max()) / 448)
    wanted = (x / step).to(torch.float8_e4m3fn).float() * step
    assert torch.equal(fake_quant_activation(x, fp8, static=step.reshape(1)), wanted)
    assert torch.equal(
        fake_quant_activation(x * 10, fp8, static=step.reshape(1)).abs().max(), step * 448
    )
    nv = scheme("NVFP4").activation
    whole = static_scale(x.abs().max(), nv)
    assert torch.equal(
        fake_quant_activation(x, nv, static=whole.reshape(1)), fake_quant_activation(x, nv)
    )
    mx = scheme("MXFP4").activation
    with pytest.raises(KernelError, match="beforehand"):
        static_scale(x.abs().max(), mx)
    with pytest.raises(KernelError, match="beforehand"):
        fake_quant_activation(x, mx, static=step)
    assert isinstance(data_type("int"), Integer)
