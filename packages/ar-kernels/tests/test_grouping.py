"""Grouped views against index arithmetic."""

from __future__ import annotations

import pytest
import torch

from ar_kernels.numerics import expand, grouped, ungrouped
from ar_schemes import Granularity, SchemeError, Span

CASES = (
    Granularity(Span.TENSOR),
    Granularity(Span.CHANNEL),
    Granularity(Span.TOKEN),
    Granularity(Span.GROUP, (4,)),
    Granularity(Span.GROUP, (1,)),
    Granularity(Span.GROUP, (12,)),
    Granularity(Span.TILE, (2, 3)),
    Granularity(Span.TILE, (6, 1)),
)


@pytest.mark.parametrize("granularity", CASES, ids=str)
def test_each_row_of_groups_holds_the_elements_of_one_region(granularity: Granularity) -> None:
    x = torch.arange(6 * 12).reshape(6, 12)
    step_r, step_c = granularity.region(6, 12)
    found = grouped(x, granularity)
    for r in range(found.shape[0]):
        for g in range(found.shape[1]):
            region = x[r * step_r : (r + 1) * step_r, g * step_c : (g + 1) * step_c]
            assert found[r, g].tolist() == region.flatten().tolist()


@pytest.mark.parametrize("granularity", CASES, ids=str)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_ungrouped_undoes_grouped(granularity: Granularity, lead: tuple[int, ...]) -> None:
    shape = (*lead, 6, 12)
    x = torch.randn(shape)
    assert torch.equal(ungrouped(grouped(x, granularity), shape, granularity), x)


@pytest.mark.parametrize("granularity", CASES, ids=str)
def test_expand_repeats_each_scale_over_its_region(granularity: Granularity) -> None:
    shape = (2, 6, 12)
    scale = torch.randn(2, *granularity.scale_shape(6, 12))
    found = expand(scale, shape, granularity)
    assert found.shape == shape
    wanted = scale.unsqueeze(-1).expand_as(grouped(found, granularity))
    assert torch.equal(grouped(found, granularity), wanted)


def test_a_region_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SchemeError, match="does not divide"):
        grouped(torch.zeros(2, 10), Granularity(Span.GROUP, (4,)))
