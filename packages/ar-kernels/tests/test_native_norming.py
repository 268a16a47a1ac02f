"""Gradients of RMS norms: those of the formula in float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from ar_kernels.native import library, norming, steps

pytestmark = [
    pytest.mark.skipif(isinstance(library.load(), str), reason="the native library is not built"),
    pytest.mark.usefixtures("isa"),
]


def formula(x: torch.Tensor, weight: torch.Tensor, form: int) -> torch.Tensor:
    n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return n * (weight + 1 if form == steps.ADDS_ONE else weight)


@pytest.mark.parametrize("form", [steps.ROUNDS_FIRST, steps.ADDS_ONE, steps.PLAIN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 50, 80), (2, 64, 3, 64)], ids=str)
def test_norms_and_their_gradients(shape, dtype: torch.dtype, form: int) -> None:
    made = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=made) * 3).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], generator=made).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=made).to(dtype)
    assert norming.serves(x, weight)
    found = norming.norm(x, weight, 1e-6, form)
    double = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = formula(*double, form)
    wanted = torch.autograd.grad(expected, double, grad.double())
    bound = 2e-6 if dtype is torch.float32 else 6e-3
    pairs = [(found, expected), *zip(torch.autograd.grad(found, (x, weight), grad), wanted)]  # noqa: B905
    for one, other in pairs:
        assert one.dtype == dtype
        assert (
            float((one.detach().double() - other.detach()).norm() / other.detach().norm()) < bound
        )


def test_a_view_with_gaps_is_taken_and_other_shapes_are_not() -> None:
    x = torch.randn(4, 3, 64)[:, :, :32]
    weight = torch.ones(32)
    torch.testing.assert_close(
        norming.norm(x, weight, 1e-6, steps.PLAIN), formula(x, weight, steps.PLAIN)
    )
    assert norming.norm(x[:0], weight, 1e-6, steps.PLAIN).shape == (0, 3, 32)
    assert not norming.serves(x, torch.ones(16))
    assert not norming.serves(x[..., :8], torch.ones(8))
    assert not norming.serves(x, weight.bfloat16())
    assert not norming.serves(x.half(), weight.half())
