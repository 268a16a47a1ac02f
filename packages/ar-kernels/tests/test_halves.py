"""Activations in bfloat16 are quantized to the bit as in float32."""

from __future__ import annotations

import pytest
import torch

from ar_kernels.numerics.activation import fake_quant_activation
from ar_kernels.numerics.halves import fake_quant_alike
from ar_schemes import scheme

SPECS = {name: scheme(name).activation for name in ("MXFP4", "MXFP8", "NVFP4")}
SPECS["MXFP6"] = SPECS["MXFP4"].with_(bits=6)
SPECS["MXFP4 rceil"] = SPECS["MXFP4"].with_(data_type="mx_fp_rceil")


def given() -> torch.Tensor:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 64, generator=made) * torch.randn(64, generator=made).mul(4).exp()
    x[0, 0] = 0
    x[0, 1] = torch.linspace(-8, 8, 64)  # values on the borders
    x[0, 2] *= 2.0**-120
    x[0, 3] *= 2.0**100
    x[0, 4, ::2] = -0.0
    return x.bfloat16()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_values_and_gradients_are_those_of_float32(spec) -> None:
    x = given().requires_grad_()
    grad = torch.randn(x.shape).bfloat16()
    plain, alike = fake_quant_activation(x, spec), fake_quant_alike(x, spec)
    assert alike.dtype == torch.bfloat16
    assert torch.equal(alike, plain.to(alike.dtype))
    assert torch.equal(torch.signbit(alike), torch.signbit(plain))
    pair = [torch.autograd.grad(y, x, g)[0] for y, g in ((plain, grad.float()), (alike, grad))]
    assert torch.equal(*pair)
    with torch.no_grad():
        assert torch.equal(fake_quant_alike(x, spec), alike)


def test_other_types_of_activations_keep_theirs() -> None:
    x = given().float()
    made = fake_quant_alike(x, SPECS["MXFP4"])
    assert made.dtype == torch.float32
    assert torch.equal(made, fake_quant_activation(x, SPECS["MXFP4"]))
    assert fake_quant_alike(x[:0].bfloat16(), SPECS["MXFP4"]).shape == (0, 40, 64)


def test_what_is_not_finite_stays_so() -> None:
    x = given()
    x[0, 0, 0] = float("nan")
    assert fake_quant_alike(x, SPECS["MXFP4"])[0, 0, 0].isnan()
