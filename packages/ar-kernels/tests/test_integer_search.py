"""Searched parameters: better than plain ones, and near the best that brute force finds."""

from __future__ import annotations

import pytest
import torch

from ar_kernels.numerics.grouping import expand
from ar_kernels.numerics.integer import Integer
from ar_schemes import Granularity, Span, TensorSpec

INT = Integer()


def loss(
    weight: torch.Tensor, fake: torch.Tensor, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Return squared error per row, each channel weighted by its importance."""
    error = (fake - weight).square()
    return (error if importance is None else error * importance).sum(-1)


def weights(rows: int = 64, columns: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_no_row_gets_worse_and_narrow_widths_gain_a_tenth(bits: int, symmetric: bool) -> None:
    spec = TensorSpec(bits=bits, granularity=Granularity(Span.CHANNEL), symmetric=symmetric)
    weight = weights()
    plain = loss(weight, INT.fake_quant(weight, spec, INT.parameters(weight, spec)))
    searched = loss(weight, INT.fake_quant(weight, spec, INT.search(weight, spec)))
    assert (searched <= plain * (1 + 1e-5)).all()
    if bits <= 3:
        assert searched.sum() < 0.9 * plain.sum()  # measured 0.83 to 0.86


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_search_is_within_a_percent_of_brute_force(bits: int) -> None:
    spec = TensorSpec(bits=bits, granularity=Granularity(Span.CHANNEL))
    weight = weights(16)
    peak = 2 ** (bits - 1)
    best = torch.full((16,), float("inf"))
    largest = weight.abs().amax(-1, keepdim=True) / peak
    for factor in torch.linspace(0.2, 1.4, 2000).tolist():
        for sign in (1, -1):
            scale = (largest * factor * sign).half().float()
            codes = (weight / scale).round().clamp(-peak, peak - 1)
            best = torch.minimum(best, loss(weight, codes * scale))
    found = loss(weight, INT.fake_quant(weight, spec, INT.search(weight, spec)))
    assert found.sum() <= 1.01 * best.sum()


def test_importance_lowers_the_error_where_it_matters() -> None:
    spec = TensorSpec(bits=2, granularity=Granularity(Span.CHANNEL))
    weight = weights()
    importance = torch.ones(32)
    importance[:4] = 100
    blind = INT.fake_quant(weight, spec, INT.search(weight, spec))
    aware = INT.fake_quant(weight, spec, INT.search(weight, spec, importance=importance))
    assert loss(weight, aware, importance).sum() < 0.9 * loss(weight, blind, importance).sum()


def test_importance_may_differ_by_row() -> None:
    spec = TensorSpec(bits=2, granularity=Granularity(Span.GROUP, (8,)))
    weight = weights()
    importance = torch.rand(64, 32, generator=torch.Generator().manual_seed(1)) + 0.1
    whole = INT.search(weight, spec, importance=importance)
    for row in (0, 17, 63):
        alone = INT.search(weight[row : row + 1], spec, importance=importance[row])
        assert torch.equal(whole.scale[row : row + 1], alone.scale)


def test_a_weight_that_is_exactly_representable_is_found() -> None:
    spec = TensorSpec(bits=4, granularity=Granularity(Span.GROUP, (16,)))
    codes = torch.arange(-8, 8).float().repeat(4, 2)
    scale = torch.tensor([[0.25, -0.5]] * 4)
    weight = codes * expand(scale, (4, 32), spec.granularity)
    assert torch.equal(INT.fake_quant(weight, spec, INT.search(weight, spec)), weight)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_search_gives_the_same_bits_twice(symmetric: bool) -> None:
    spec = TensorSpec(bits=3, granularity=Granularity(Span.GROUP, (8,)), symmetric=symmetric)
    one, two = (INT.search(weights(), spec) for _ in range(2))
    assert torch.equal(one.scale, two.scale)
    if one.zero_point is not None and two.zero_point is not None:
        assert torch.equal(one.zero_point, two.zero_point)
