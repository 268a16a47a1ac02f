from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("transformers")

from ar_kernels.hf.packed_experts import knows, pack
from ar_kernels.hf.stored import StoredLayer
from ar_kernels.hf.trials import Placed, places_of
from ar_kernels.layouts.base import TensorFact

KINDS = ("gate_proj", "up_proj")
KEYS = [f"experts.{n}.{kind}.weight" for n in (10, 2, 1, 0, *range(3, 10), 11) for kind in KINDS]


def in_halves(tensors):
    """Fuse gate and up of the first and of the last experts, each into one parameter."""
    out = {}
    for name, numbers in (("text", range(6)), ("image", range(6, 12))):
        whole = [
            torch.cat([tensors[f"experts.{n}.{kind}.weight"] for kind in KINDS]) for n in numbers
        ]
        out[name] = torch.stack(whole)
    return out


def test_every_matrix_is_found_where_a_conversion_put_it() -> None:
    found = places_of(KEYS, in_halves)
    assert found["experts.2.up_proj.weight"] == Placed("text", 2, 1, 2)
    assert found["experts.10.gate_proj.weight"] == Placed("image", 4, 0, 2)
    assert len(found) == len(KEYS)


def mixed(tensors):
    return {"one": torch.stack([sum(tensors.values())])}


def lossy(tensors):
    return {"one": torch.stack(list(tensors.values())[:-1])}


def turned(tensors):
    return {"one": torch.stack(list(tensors.values())).transpose(1, 2)}


def flat(tensors):
    return {"one": torch.cat(list(tensors.values()))}


def choosy(tensors):
    raise ValueError(tensors)


@pytest.mark.parametrize("convert", [mixed, lossy, turned, flat, choosy])
def test_what_puts_no_whole_matrix_in_a_place_tells_nothing(convert) -> None:
    assert places_of(KEYS, convert) == {}


class Usual(nn.Module):
    """Experts as transformers writes them without a gate of its own: two of four compute."""

    beyond = 1.0
    shift = 0.0

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(1)
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 6, generator=drawn))
        self.down_proj = nn.Parameter(torch.randn(2, 6, 8, generator=drawn))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for token, numbers in enumerate(top_k_index.tolist()):
            for place, number in enumerate(numbers):
                given = hidden_states[token]
                if number < len(self.down_proj):
                    gate, up = functional.linear(given, self.gate_up_proj[number]).chunk(2, -1)
                    made = functional.linear(self.act_fn(gate) * up, self.down_proj[number])
                    made = made + self.shift
                else:
                    made = self.beyond * given
                out[token] += made * top_k_weights[token, place]
        return out


class Nothing(Usual):
    beyond = 0.0


class Twice(Usual):
    beyond = 2.0


class Shifted(Usual):
    shift = 0.5


class Other(Usual):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise TypeError(hidden_states)


def taken_apart(module: Usual) -> None:
    experts = []
    for number in range(4):
        expert = nn.Module()
        gate, up = module.gate_up_proj[number].chunk(2)
        for leaf, weight in (("gate_proj", gate), ("up_proj", up)):
            expert.add_module(leaf, nn.Linear(6, 8, bias=False))
            expert.get_submodule(leaf).weight.data = weight.data
        if number < 2:
            expert.add_module("down_proj", nn.Linear(8, 6, bias=False))
            expert.down_proj.weight.data = module.down_proj[number].data
        experts.append(expert)
    del module.gate_up_proj, module.down_proj
    pack(module, experts, (KINDS, "down_proj"), "gate_up_proj")


@pytest.mark.parametrize("kind", [Usual, Nothing])
def test_experts_that_compute_the_usual_formula_do_so_taken_apart(kind) -> None:
    module, drawn = kind(), torch.Generator().manual_seed(2)
    tokens, weights = torch.randn(8, 6, generator=drawn), torch.rand(8, 2, generator=drawn)
    index = torch.randint(0, 4, (8, 2), generator=drawn)
    assert (index >= 2).any()
    assert knows(module)
    with torch.no_grad():
        wanted = module(tokens, index, weights)
        taken_apart(module)
        torch.testing.assert_close(module(tokens, index, weights), wanted)


def test_what_is_tried_leaves_the_module_as_it_was() -> None:
    module = Usual()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    knows(module)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("kind", [Twice, Shifted, Other])
def test_experts_of_another_formula_are_not_taken_for_usual_ones(kind) -> None:
    assert not knows(kind())


def test_a_float_weight_with_another_tensor_beside_it_is_not_packed() -> None:
    matrix, codes = TensorFact((4, 8), torch.float32), TensorFact((4, 8), torch.float8_e4m3fn)
    assert not StoredLayer("mlp.gate", {"weight": matrix, "weight_1": matrix}).packed
    assert StoredLayer("mlp.gate", {"weight": codes, "weight_scale": matrix}).packed
    assert StoredLayer("mlp.gate", {"qweight": matrix}).packed
