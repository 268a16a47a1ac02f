"""Static asymmetric activations: the zero point of the files is used, and asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ar_kernels import QuantLinear, layout
from ar_kernels.layer_tensors import ranges_of
from ar_kernels.testing import quantized
from ar_schemes import Granularity, Span, TensorSpec

WEIGHT = TensorSpec(bits=8, granularity=Granularity(Span.CHANNEL))
ROWS, COLUMNS = 24, 64


def activation(*, bits: int = 8, symmetric: bool = False) -> TensorSpec:
    whole = Granularity(Span.TENSOR)
    return TensorSpec(bits=bits, granularity=whole, symmetric=symmetric, dynamic=False)


def weight(zero: int):
    extra = {"input_scale": torch.tensor([0.02]), "input_zero_point": torch.tensor([float(zero)])}
    return replace(quantized(WEIGHT, ROWS, COLUMNS), extra=extra)


@pytest.mark.parametrize("order", ["ct_int", "ct_pack"])
@pytest.mark.parametrize("zero", [-128, -40, 0, 100])
def test_inputs_are_shifted_as_signed_codes_say(order, zero) -> None:
    found = weight(zero)
    x = torch.randn(5, COLUMNS)
    codes = ((x / 0.02).round() + zero).clamp(-128, 127)
    wanted = (codes - zero) * 0.02 @ found.dequantize().t()
    layer = QuantLinear.from_weight(
        found, layout=order, dtype=torch.float32, activation=activation()
    )
    torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)
    state = layer.state_dict()
    assert state["input_zero_point"].dtype == torch.int8
    assert state["input_zero_point"].tolist() == [zero]


def test_a_layout_gives_back_what_it_was_given() -> None:
    found = weight(-7)
    order = layout("ct_int")
    back = order.unpack(order.pack(found), WEIGHT, ROWS, COLUMNS)
    assert {k: v.tolist() for k, v in back.extra.items()} == {
        k: v.tolist() for k, v in found.extra.items()
    }


def test_the_middle_follows_the_width_and_symmetric_inputs_have_none() -> None:
    extra = weight(-3).extra
    assert ranges_of(extra, activation(bits=4))["static_zero"].tolist() == [5]
    assert "static_zero" not in ranges_of(extra, activation(symmetric=True))
