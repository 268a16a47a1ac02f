"""Quantized activations times quantized weights, against a stand-in for torch's operator.

The stand-in makes the checks of PyTorch's ScaledBlas.cpp and multiplies in float64. It shows that
we hand over what the operator asks for; it cannot show what a GPU makes of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional
from torch.nn.functional import ScalingType, SwizzleType

from ar_kernels import KernelError, equal
from ar_kernels.backends import Need, cuda_scaled_mm
from ar_kernels.backends.cuda_scaled_mm import CUDA_SCALED_MM, ScaledMm
from ar_kernels.backends.scaled_recipes import e2m1_codes, swizzled, unswizzled
from ar_kernels.numerics.activation import fake_quant_activation, static_scale
from ar_kernels.numerics.elements import E2M1
from ar_kernels.testing import BackendConformance, quantized
from ar_schemes import Granularity, Span, TensorSpec, scheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ar_kernels.backends import PackedWeight
    from ar_kernels.weight import QuantizedWeight

FP8 = scheme("FP8_STATIC").weight
TOKEN = TensorSpec("fp", 8, Granularity(Span.TOKEN), scale_dtype="float32")
TENSOR = replace(TOKEN, granularity=Granularity(Span.TENSOR))


def pair(name: str) -> tuple[TensorSpec, TensorSpec]:
    found = scheme(name)
    assert found.activation is not None
    return found.weight, found.activation


PAIRS = {
    "tensor": (scheme("FPW8A16").weight, TENSOR),
    "row": (FP8, TOKEN),
    "row, tensor activations": (FP8, TENSOR),
    "row, tensor weights": (scheme("FPW8A16").weight, TOKEN),
    "block": pair("FP8_BLOCK"),
    "mx": pair("MXFP8"),
    "nv": (pair("NVFP4")[0], replace(pair("NVFP4")[1], dynamic=True)),
}
STATIC = {
    "tensor": (scheme("FPW8A16").weight, replace(TENSOR, dynamic=False)),
    "row": pair("FP8_STATIC"),
    "nv": (pair("NVFP4")[0], replace(pair("NVFP4")[1], dynamic=False)),
}


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor | list[Tensor],
    scale_recipe_a: ScalingType | list[ScalingType],
    scale_b: Tensor | list[Tensor],
    scale_recipe_b: ScalingType | list[ScalingType],
    swizzle_a: SwizzleType | list[SwizzleType] | None = None,
    swizzle_b: SwizzleType | list[SwizzleType] | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Stand in for `torch.nn.functional.scaled_mm`."""
    assert mat_a.stride(1) == 1
    assert mat_b.stride(0) == 1, "the second operand must be column-major"
    a = _values(mat_a, scale_a, scale_recipe_a, swizzle_a)
    b = _values(mat_b.t(), scale_b, scale_recipe_b, swizzle_b, right=True)
    assert a.shape[1] % 16 == 0
    assert b.shape[0] % 16 == 0
    return (a @ b.t()).to(output_dtype)


def _values(
    codes: Tensor,
    scale: Tensor | list[Tensor],
    recipe: ScalingType | list[ScalingType],
    swizzle: SwizzleType | list[SwizzleType] | None,
    *,
    right: bool = False,
) -> Tensor:
    """Return what codes [R, K] and scales stand for, float64."""
    if isinstance(recipe, list):
        assert isinstance(scale, list)
        assert isinstance(swizzle, list)
        assert recipe == [ScalingType.BlockWise1x16, ScalingType.TensorWise]
        assert swizzle == [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
        assert codes.dtype == torch.float4_e2m1fn_x2
        bits = codes.view(torch.uint8)
        four = torch.stack([bits & 15, bits >> 4], -1).reshape(codes.shape[0], -1)
        assert scale[1].dtype == torch.float32
        assert scale[1].numel() == 1
        block = _blocks(scale[0], torch.float8_e4m3fn, four.shape, 16)
        return E2M1.decode(four).double() * block * scale[1].double()
    assert isinstance(scale, torch.Tensor)
    assert codes.dtype == torch.float8_e4m3fn
    values, (rows, columns) = codes.double(), codes.shape
    if recipe == ScalingType.BlockWise1x32:
        assert swizzle == SwizzleType.SWIZZLE_32_4_4
        return values * _blocks(scale, torch.float8_e8m0fnu, (rows, columns), 32)
    assert scale.dtype == torch.float32
    if recipe == ScalingType.TensorWise:
        assert scale.numel() == 1
        return values * scale.double()
    if recipe == ScalingType.RowWise:
        assert scale.shape == ((1, rows) if right else (rows, 1))
        assert scale.is_contiguous()
        return values * scale.double().reshape(rows, 1)
    if recipe == ScalingType.BlockWise1x128:
        assert scale.shape == (rows, columns // 128)
        assert scale.stride(0) == 1
        return values * scale.double().repeat_interleave(128, 1)
    assert recipe == ScalingType.BlockWise128x128
    padded = -(-columns // 128 // 4) * 4
    assert scale.shape == (padded, rows // 128)
    assert scale.stride() == (1, padded)
    wide = scale[: columns // 128].t().double()
    return values * wide.repeat_interleave(128, 0).repeat_interleave(128, 1)


def _blocks(scale: Tensor, dtype: torch.dtype, shape: tuple[int, ...], size: int) -> Tensor:
    """Return swizzled block scales one per element: element by element, as the manual draws it."""
    rows, columns = shape
    high, wide = -(-rows // 128), -(-columns // size // 4)
    assert scale.dtype == dtype
    assert scale.numel() == high * 128 * wide * 4
    row, group = torch.meshgrid(torch.arange(rows), torch.arange(columns // size), indexing="ij")
    tile = row // 128 * wide + group // 4
    at = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    return scale.flatten().float()[at].double().repeat_interleave(size, 1)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "scaled_mm", scaled_mm)


def weight_of(spec: TensorSpec, activation: TensorSpec) -> QuantizedWeight:
    rows, columns = (256, 384) if spec.granularity.span is Span.TILE else (96, 160)
    weight = quantized(spec, rows, columns)
    if activation.dynamic:
        return weight
    name = "input_global_scale" if activation.data_type.startswith("nv") else "input_scale"
    value = static_scale(torch.tensor([3.0]), activation)
    return replace(weight, extra={**weight.extra, name: value})


class ScaledMmConformance(BackendConformance):
    subject = ScaledMm(device="cpu")
    specs = tuple(spec for spec, _ in PAIRS.values())
    pairs = PAIRS

    def cases(self) -> Iterator[tuple[Need, QuantizedWeight, PackedWeight]]:
        for spec, activation in self.pairs.values():
            weight = weight_of(spec, activation)
            need = Need(spec, *weight.shape, "cpu", torch.bfloat16, activation)
            yield need, weight, self.subject.pack(weight, need)

    def test_unpack_returns_the_weight_that_was_packed(self) -> None:
        for need, weight, packed in self.cases():
            own = {k: v for k, v in weight.extra.items() if not k.startswith("input")}
            assert equal(self.subject.unpack(packed, need), replace(weight, extra=own))

    def test_the_product_is_that_of_the_dequantized_weight(self) -> None:
        for need, weight, packed in self.cases():
            assert need.activation is not None
            bias = torch.linspace(-1, 1, need.rows).to(need.dtype)
            static = next((v for k, v in weight.extra.items() if k.startswith("input")), None)
            for x in self.inputs(need):
                if need.activation.granularity.span is Span.TENSOR and not x.numel():
                    continue
                fake = fake_quant_activation(x, need.activation, static=static) if x.numel() else x
                for add in (None, bias):
                    found = self.subject.linear(x, packed, add)
                    assert found.dtype == need.dtype
                    assert found.shape == (*x.shape[:-1], need.rows)
                    assert self.error(found, fake, weight, add) <= 4e-3, need

    def test_the_op_runs_it_and_compiles_in_one_graph(self) -> None:
        assert CUDA_SCALED_MM.name == "cuda_scaled_mm"  # registered for cuda, not for the stand-in


class TestDynamic(ScaledMmConformance):
    refused = (
        Need(FP8, 96, 160, "cpu", torch.bfloat16),
        Need(FP8, 96, 160, "cpu", torch.float32, TOKEN),
        Need(FP8, 96, 150, "cpu", torch.bfloat16, TOKEN),
        Need(FP8, 96, 160, "cuda", torch.bfloat16, TOKEN),
        Need(TensorSpec(), 96, 160, "cpu", torch.bfloat16, TOKEN),
        Need(*(scheme("MXFP4").weight, 96, 160, "cpu", torch.bfloat16, scheme("MXFP4").activation)),
    )


class TestStatic(ScaledMmConformance):
    specs = tuple(spec for spec, _ in STATIC.values())
    pairs = STATIC


def test_static_activations_without_a_range_are_refused() -> None:
    spec, activation = STATIC["row"]
    need = Need(spec, 96, 160, "cpu", torch.bfloat16, activation)
    with pytest.raises(KernelError, match="no range"):
        ScaledMm(device="cpu").pack(quantized(spec, 96, 160), need)


@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    [
        ("row", (8, 0), "8.9 or newer"),
        ("row", (8, 9), None),
        ("row", (12, 0), None),
        ("block", (9, 0), None),
        ("block", (10, 0), "9.0 exactly"),
        ("mx", (9, 0), "10.0 or newer"),
        ("nv", (12, 0), None),
    ],
)
def test_each_recipe_asks_for_its_compute_capability(
    name: str, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_scaled_mm, "capability", lambda _: capability)
    spec, activation = PAIRS[name]
    found = CUDA_SCALED_MM.refuses(Need(spec, 256, 256, "cuda", torch.bfloat16, activation))
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (128, 4), (130, 5), (300, 9)])
def test_swizzled_scales_come_back(rows: int, groups: int) -> None:
    scale = torch.randint(1, 120, (rows, groups), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    back = unswizzled(swizzled(scale), rows, groups)
    assert torch.equal(back.view(torch.uint8), scale.view(torch.uint8))


def test_four_bit_codes_are_the_nearest_with_ties_to_even() -> None:
    values = torch.arange(-64, 65) / 8  # every value, every tie, and beyond both ends
    expected = E2M1.decode(E2M1.encode(E2M1.round(values)))
    assert torch.equal(E2M1.decode(e2m1_codes(values)), expected)
