"""Where projections of experts are in fused parameters, and putting them there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ar_kernels.hf.fused import FusedPart, fused_parts, joined_experts


class Experts(nn.Module):
    """Three experts of 4 channels, 6 inside."""

    def __init__(self, *, transposed: bool, apart: bool, noted: bool = True) -> None:
        super().__init__()
        up, down = (3, 12, 4), (3, 4, 6)
        if transposed:
            up, down = (3, 4, 12), (3, 6, 4)
        self.gate_up_proj = nn.Parameter(torch.zeros(up))
        self.down_proj = nn.Parameter(torch.zeros(down))
        if noted:
            self.is_transposed, self.is_concatenated = transposed, not apart


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_the_layout_is_as_noted_or_as_shapes_fit(transposed, noted) -> None:
    kinds = fused_parts(Experts(transposed=transposed, apart=False, noted=noted))
    assert kinds == {
        "gate_proj": FusedPart("gate_up_proj", transposed, (0, 6, 1)),
        "up_proj": FusedPart("gate_up_proj", transposed, (6, 12, 1)),
        "down_proj": FusedPart("down_proj", transposed, None),
    }


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_single_experts_go_to_their_places(transposed, apart) -> None:
    model = nn.Module()
    model.experts = Experts(transposed=transposed, apart=apart)
    generator = torch.Generator().manual_seed(0)
    sizes = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}
    single = {
        f"experts.{e}.{kind}.weight": torch.randn(size, generator=generator)
        for e in range(3)
        for kind, size in sizes.items()
    }
    whole = joined_experts(dict(single), model)
    assert whole.keys() == {"experts.gate_up_proj", "experts.down_proj"}
    stored = whole["experts.gate_up_proj"]
    assert stored.shape == model.experts.gate_up_proj.shape
    first = stored[0].t() if transposed else stored[0]
    gate = first[0::2] if apart else first[:6]
    assert torch.equal(gate, single["experts.0.gate_proj.weight"])
    kinds = fused_parts(model.experts)
    for kind in sizes:
        view = kinds[kind].view(whole[f"experts.{kinds[kind].parameter}"])
        for e in range(3):
            assert torch.equal(view[e], single[f"experts.{e}.{kind}.weight"])


def test_experts_that_are_not_all_there_are_left_alone() -> None:
    model = nn.Module()
    model.experts = Experts(transposed=False, apart=False)
    single = {"experts.0.down_proj.weight": torch.zeros(4, 6)}
    assert joined_experts(dict(single), model).keys() == single.keys()


def test_shapes_that_fit_no_layout_are_told() -> None:
    odd = Experts(transposed=False, apart=False, noted=False)
    odd.down_proj = nn.Parameter(torch.zeros(3, 5, 7))
    assert "cannot tell rows from columns" in fused_parts(odd)
    odd.is_transposed = False
    odd.gate_up_proj = nn.Parameter(torch.zeros(3, 11, 4))
    assert "11 rows" in fused_parts(odd)
    assert isinstance(fused_parts(nn.Linear(2, 2)), str)
