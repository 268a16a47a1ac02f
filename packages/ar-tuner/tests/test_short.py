"""Attention is handed over where it may be, and only there."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ar_kernels.native import attending, library
from ar_tuner.short import ShortRows

attend = functional.scaled_dot_product_attention


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the scales of the calls that went to ar-kernels, which are done by torch here."""
    calls: list[float] = []

    def attention(q, k, v, scale):
        calls.append(scale)
        return attend(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    monkeypatch.setattr(attending, "attention", attention)
    monkeypatch.setattr(attending, "serves", lambda q, k, v: q.dtype == torch.bfloat16)
    return calls


def test_plain_causal_attention_is_handed_over(taken: list[float]) -> None:
    q = torch.randn(1, 4, 8, 16, dtype=torch.bfloat16)
    with ShortRows():
        functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        functional.scaled_dot_product_attention(q, q, q, None, 0.0, True, scale=0.5)  # noqa: FBT003
        functional.scaled_dot_product_attention(
            q, q[:, :2], q[:, :2], is_causal=True, enable_gqa=True
        )
    assert taken == [0.25, 0.5, 0.25]
    functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert len(taken) == 3


def test_whatever_else_stays_with_torch(taken: list[float]) -> None:
    q = torch.randn(1, 4, 8, 16, dtype=torch.bfloat16)
    seen = torch.ones(8, 8, dtype=torch.bool)
    with ShortRows():
        functional.scaled_dot_product_attention(q, q, q)
        functional.scaled_dot_product_attention(q, q, q, attn_mask=seen)
        functional.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=0.1)
        functional.scaled_dot_product_attention(*[q.float()] * 3, is_causal=True)
        with pytest.raises(RuntimeError):
            functional.scaled_dot_product_attention(q, q[:, :2], q[:, :2], is_causal=True)
    assert not taken


@pytest.mark.skipif(
    isinstance(library.load(), str) or library.ISAS[-1] not in library.supported(),
    reason="no native library, or a processor without products of bfloat16",
)
def test_what_is_handed_over_is_what_torch_gives() -> None:
    q = torch.randn(2, 4, 24, 32, dtype=torch.bfloat16)
    expected = attend(q.double(), q.double(), q.double(), is_causal=True)
    with ShortRows():
        found = functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert float((found.double() - expected).norm() / expected.norm()) < 6e-3
