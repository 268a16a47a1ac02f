"""`QuantizedWeight`: what it refuses, how it is stored and compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ar_kernels import KernelError, QuantizedWeight, equal
from ar_kernels.testing import quantized
from ar_schemes import ArError, Granularity, Span, TensorSpec

SPEC = TensorSpec(granularity=Granularity(Span.GROUP, (8,)))
ASYM = SPEC.with_(symmetric=False)


def test_errors_are_those_of_the_project() -> None:
    assert issubclass(KernelError, ArError)


@pytest.mark.parametrize(
    "codes",
    [torch.zeros(4, 8), torch.zeros(8, dtype=torch.uint8), torch.zeros(4, 8, dtype=torch.int8)],
    ids=["float", "one dimension", "int8"],
)
def test_codes_must_be_a_matrix_of_uint8(codes: torch.Tensor) -> None:
    with pytest.raises(KernelError, match="codes must be uint8 with at least two dimensions"):
        QuantizedWeight(SPEC, codes, torch.ones(4, 1))


@pytest.mark.parametrize("shape", [(4, 2), (1, 4), (2, 4, 1), (4,)], ids=str)
def test_scale_must_have_the_shape_of_the_granularity(shape: tuple[int, ...]) -> None:
    with pytest.raises(KernelError, match=r"it must be \[4, 1\]"):
        QuantizedWeight(SPEC, torch.zeros(4, 8, dtype=torch.uint8), torch.ones(shape))


def test_scale_must_have_the_leading_dimensions_of_the_codes() -> None:
    with pytest.raises(KernelError, match=r"it must be \[3, 4, 1\]"):
        QuantizedWeight(SPEC, torch.zeros(3, 4, 8, dtype=torch.uint8), torch.ones(2, 4, 1))


@pytest.mark.parametrize(
    "zero",
    [torch.zeros(1, 4, dtype=torch.uint8), torch.zeros(4, 1)],
    ids=["shape", "type"],
)
def test_zero_point_must_be_uint8_in_the_shape_of_the_scale(zero: torch.Tensor) -> None:
    with pytest.raises(KernelError, match="must be uint8 and have the shape"):
        QuantizedWeight(ASYM, torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 1), zero)


@pytest.mark.parametrize("spec", [SPEC, ASYM], ids=["sym", "asym"])
def test_tensors_and_back_give_the_same_weight(spec: TensorSpec) -> None:
    weight = replace(quantized(spec, 4, 16), extra={"global_scale": torch.tensor(3.0)})
    stored = weight.tensors()
    expected = {"codes", "scale", "extra.global_scale"}
    assert stored.keys() == (expected if spec.symmetric else expected | {"zero_point"})
    assert equal(QuantizedWeight.from_tensors(spec, stored), weight)


def test_from_tensors_names_what_is_missing() -> None:
    with pytest.raises(KernelError, match=r"needs \['codes'\], found only \['scale'\]"):
        QuantizedWeight.from_tensors(SPEC, {"scale": torch.ones(4, 1)})


def test_equal_sees_every_bit() -> None:
    weight = quantized(ASYM, 4, 16)
    assert weight.zero_point is not None
    assert equal(weight, quantized(ASYM, 4, 16))
    other = {
        "spec": replace(weight, spec=ASYM.with_(bits=5)),
        "codes": replace(weight, codes=weight.codes ^ 1),
        "scale": replace(weight, scale=weight.scale * 2),
        "type of the scale": replace(weight, scale=weight.scale.float()),
        "zero point": replace(weight, zero_point=weight.zero_point ^ 1),
        "no zero point": replace(weight, zero_point=None),
        "extra": replace(weight, extra={"more": torch.ones(1)}),
    }
    assert [name for name, changed in other.items() if equal(weight, changed)] == []


def test_to_meta_keeps_shapes() -> None:
    moved = replace(quantized(ASYM, 4, 16), extra={"more": torch.ones(1)}).to("meta")
    assert moved.shape == (4, 16)
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}


def test_dequantize_rounds_the_float32_product_once() -> None:
    weight = quantized(SPEC, 4, 16)
    scale = weight.scale.float().repeat_interleave(8, -1)
    expected = scale * (weight.codes.float() - 8)
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(weight.dequantize(torch.bfloat16), expected.bfloat16())


def test_dequantize_of_an_unknown_data_type_lists_the_known() -> None:
    weight = replace(quantized(SPEC, 4, 16), spec=SPEC.with_(data_type="imt"))
    with pytest.raises(KernelError, match="Did you mean int"):
        weight.dequantize()
