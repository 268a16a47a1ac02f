"""Causal attention of short rows: what torch gives in float64, and nothing it does not serve."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ar_kernels.native import attending, library

pytestmark = pytest.mark.skipif(
    isinstance(library.load(), str) or library.ISAS[-1] not in library.supported(),
    reason="no native library, or a processor without products of bfloat16",
)


def given(heads: int, tokens: int, width: int) -> list[torch.Tensor]:
    """Return queries, keys and values as models hand them over: heads behind tokens."""
    made = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(2, tokens, n, width, generator=made).bfloat16().transpose(1, 2).requires_grad_()
        for n in (heads, 2, 2)
    ]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (7, 64), (40, 24), (256, 64), (512, 32)])
def test_attention_and_its_gradients(heads: int, tokens: int, width: int) -> None:
    q, k, v = given(heads, tokens, width)
    assert attending.serves(q, k, v)
    found = attending.attention(q, k, v, 0.2)
    double = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = functional.scaled_dot_product_attention(
        *double, is_causal=True, scale=0.2, enable_gqa=True
    )
    assert found.shape == expected.shape
    assert off(found, expected.detach()) < 6e-3
    grad = torch.randn(found.shape).bfloat16()
    wanted = torch.autograd.grad(expected, double, grad.double())
    made = torch.autograd.grad(found, (q, k, v), grad)
    # one token sees itself alone: its query and key have no gradient
    for one, other in list(zip(made, wanted, strict=True))[0 if tokens > 1 else 2 :]:
        assert off(one, other) < 1e-2


def test_weights_sum_to_one_whatever_the_scores() -> None:
    q, k, v = (t.detach() * 200 for t in given(2, 33, 32))
    found = attending.attention(q, k, torch.ones_like(v), 1.0)
    assert float((found - 1).abs().max()) <= 2**-6


def test_only_short_rows_of_bfloat16_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = given(6, 16, 32)
    assert attending.serves(q, k, v)
    assert not attending.serves(q.float(), k.float(), v.float())
    assert not attending.serves(q[:, :5], k, v)
    assert not attending.serves(q[:, :, :8], k, v)
    assert not attending.serves(*given(2, attending.MOST + 1, 16))
    monkeypatch.setenv(library.ISA_ENV, "avx2")
    assert not attending.serves(q, k, v)
