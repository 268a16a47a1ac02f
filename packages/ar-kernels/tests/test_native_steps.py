"""Norms, float products and attention of decoding: against float64, on every instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from ar_kernels.native import library, steps
from ar_kernels.native.modules import NativeLinear, NativeNorm, norm_formula
from ar_kernels.weight import KernelError

pytestmark = [
    pytest.mark.skipif(isinstance(library.load(), str), reason="the native library is not built"),
    pytest.mark.usefixtures("isa"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# sums of hundreds of products in float32; else one rounding of the output
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
FORMS = (steps.ROUNDS_FIRST, steps.ADDS_ONE, steps.PLAIN)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the distance relative to the size of the expected tensor."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("features", "columns"), [(1, 16), (101, 77), (64, 256), (17, 3)])
def test_a_float_product_is_that_of_float64(
    rows: int, features: int, columns: int, dtype: torch.dtype
) -> None:
    x, weight, bias = (
        torch.randn(*s).to(dtype) for s in ((rows, columns), (features, columns), (features,))
    )
    expected = x.double() @ weight.double().t()
    size = (x.double().abs() @ weight.double().abs().t()).norm()  # terms may cancel
    assert (steps.linear(x, weight) - expected).norm() < BOUND[dtype] * size
    again = steps.linear(x[None], weight, bias)
    assert again.shape == (1, rows, features)
    expected, size = expected + bias.double(), size + bias.double().norm()
    assert (again[0] - expected).norm() < BOUND[dtype] * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_norm_is_its_formula(form: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 5, 80).to(dtype), torch.randn(80).to(dtype)
    x[1] *= 1e-3
    wide = x.double()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = wide * (weight.double() + (form == steps.ADDS_ONE))
    found = steps.norm(x, weight, 1e-6, form)
    assert found.shape == x.shape
    assert off(found, expected) < BOUND[dtype]
    assert off(norm_formula(x, weight, 1e-6, form), expected) < BOUND[dtype]


def test_a_norm_reads_rows_with_gaps() -> None:
    x, weight = torch.randn(4, 96), torch.randn(32)
    expected = steps.norm(x[:, 32:64].contiguous(), weight, 1e-6, steps.PLAIN)
    assert torch.equal(steps.norm(x[:, 32:64], weight, 1e-6, steps.PLAIN), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "length"),
    [(1, 1, 16, 1), (8, 8, 64, 37), (6, 2, 80, 150), (10, 1, 128, 33), (16, 8, 256, 19)],
)
def test_attention_is_that_of_float64(
    heads: int, kv_heads: int, width: int, length: int, dtype: torch.dtype
) -> None:
    q = torch.randn(2, heads, 1, width).to(dtype)
    # a longer cache of which a part is used
    k, v = (torch.randn(2, kv_heads, length + 5, width).to(dtype)[:, :, :length] for _ in "kv")
    scale = width**-0.5
    one = torch.rand(2, 1, 1, length) > 0.4
    one[..., 0] = True
    for mask in (None, one, one.expand(2, heads, 1, length).clone()):
        expected = functional.scaled_dot_product_attention(
            *(t.double() for t in (q, k, v)), attn_mask=mask, scale=scale, enable_gqa=True
        )
        found = steps.attention(q, k, v, mask, scale)
        assert found.shape == (2, 1, heads, width)
        assert off(found, expected.transpose(1, 2)) < BOUND[dtype]


def test_attention_that_sees_nothing_is_zero() -> None:
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 3, 16)
    seen = torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    assert not steps.attention(q, k, k, seen, 1.0).any()


def test_large_scores_do_not_overflow() -> None:
    q, k = torch.full((1, 1, 1, 16), 1e4), torch.randn(1, 1, 9, 16)
    found = steps.attention(q, k, k, None, 1.0)
    best = k[0, 0, (k[0, 0].double() @ q[0, 0, 0].double()).argmax()]
    assert torch.allclose(found[0, 0, 0], best)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.randn(2, 32), torch.randn(8, 32)
    with pytest.raises(KernelError, match="does not fit"):
        steps.linear(x[:, :16], weight)
    with pytest.raises(KernelError, match="too small"):
        steps.linear(torch.randn(5, 32), weight)
    with pytest.raises(KernelError, match="one float type"):
        steps.linear(x.half(), weight)
    with pytest.raises(KernelError, match="no norm of 16n"):
        steps.norm(x, torch.randn(16), 1e-6, steps.PLAIN)
    with pytest.raises(KernelError, match="attention of one token"):
        steps.attention(torch.randn(1, 3, 1, 16), *(torch.randn(1, 2, 4, 16),) * 2, None, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modules_compute_what_they_replace(dtype: torch.dtype) -> None:
    plain = nn.Linear(48, 20).to(dtype)
    ours = NativeLinear.of(plain)
    assert ours.weight is plain.weight
    assert ours.bias is plain.bias
    with torch.no_grad():
        for rows in (1, 4, 5):
            x = torch.randn(rows, 48).to(dtype)
            assert off(ours(x), plain(x).double()) < 2 * BOUND[dtype]
        norm = NativeNorm(nn.Parameter(torch.randn(48).to(dtype)), 1e-5, steps.ROUNDS_FIRST)
        assert off(norm(x), norm_formula(x, norm.weight, 1e-5, 0).double()) < 2 * BOUND[dtype]


def test_modules_let_gradients_through() -> None:
    layer = nn.Sequential(NativeNorm(nn.Parameter(torch.randn(32)), 1e-5, 0), NativeLinear(32, 8))
    x = torch.randn(2, 32, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in layer.parameters())


def test_ops_have_shapes_without_data() -> None:
    ops = torch.ops.ar_kernels
    x, w = torch.randn(2, 32), torch.randn(8, 32)
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 3, 16)
    for op, args in (
        (ops.step_linear, (x, w, None)),
        (ops.step_norm, (x, w[0], 1e-6, 0)),
        (ops.step_attention, (q, k, k, None, 1.0)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_two_runs_are_equal() -> None:
    for dtype, rows in itertools.product(DTYPES, (1, 3)):
        x, w = torch.randn(rows, 512).to(dtype), torch.randn(300, 512).to(dtype)
        assert torch.equal(steps.linear(x, w), steps.linear(x, w))
