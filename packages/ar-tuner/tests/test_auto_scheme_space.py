from __future__ import annotations

import dataclasses

import pytest

from ar_schemes import LayerInfo, LayerRules, PlanSize, SchemeError, make_plan, scheme
from ar_tuner import AutoScheme, TunerError
from ar_tuner.auto_scheme.objective import (
    bits_of,
    budget_for,
    bytes_for,
    front_of,
    loss_of,
    solved,
)
from ar_tuner.auto_scheme.space import find_space
from ar_tuner.auto_scheme.terrain import Sizer, terrain

BLOCK = "model.layers.0"
SHAPES = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64}
OPTIONS = ("W2A16G32", "W4A16G32", "W8A16G32")


def layers_of(blocks: int = 2, **head) -> list[LayerInfo]:
    out = [LayerInfo("model.embed", 96, 64, None, role="embedding")]
    for i in range(blocks):
        block = f"model.layers.{i}"
        out += [LayerInfo(f"{block}.attn.{n}", r, 64, block) for n, r in SHAPES.items()]
        out += [LayerInfo(f"{block}.mlp.{n}", 96, 64, block) for n in ("gate_proj", "up_proj")]
        out.append(LayerInfo(f"{block}.mlp.down_proj", 64, 96, block))
    return [*out, LayerInfo("lm_head", 96, 64, None, role="lm_head", **head)]


def ground(layers=None, *, size=None, **rules):
    layers = layers_of() if layers is None else layers
    wanted = LayerRules(scheme("W4A16G32"), **rules)
    facts = {f"{la.name}.weight": ((la.rows, la.columns), "bfloat16") for la in layers}
    return terrain(
        layers,
        wanted,
        resolve=lambda made: make_plan(layers, made),
        size=size or Sizer((), {}, facts),
    )


def names(unit) -> str:
    return " ".join(layer.rpartition(".")[2] for layer in unit.layers)


def test_fused_layers_choose_together() -> None:
    units = find_space(AutoScheme(3.0, OPTIONS), ground()).units
    per_block = ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]
    assert [names(u) for u in units] == per_block * 2
    assert all(u.options == OPTIONS for u in units)
    assert units[0].name == "model.layers.0.attn.q_proj (+2)"


def test_lists_of_a_user_replace_fusion_block_by_block() -> None:
    asked = AutoScheme(3.0, OPTIONS, shared_layers=[["q_proj", r"up_pr.j$"], ["up_proj", "o_proj"]])
    units = find_space(asked, ground()).units
    assert [names(u) for u in units][:4] == [
        "q_proj o_proj up_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
    ]
    assert len(units) == 10
    assert len(find_space(AutoScheme(3.0, OPTIONS, shared_layers=[]), ground()).units) == 14


def test_experts_of_a_layer_share_whatever_the_user_says() -> None:
    prefix = f"{BLOCK}.mlp.experts"
    experts = [
        LayerInfo(f"{prefix}.{e}.{n}", 32, 32, BLOCK, role="experts")
        for e in range(3)
        for n in ("gate_proj", "down_proj")
    ]
    beside = LayerInfo(f"{BLOCK}.mlp.shared_experts.down_proj", 32, 32, BLOCK)
    router = LayerInfo(f"{BLOCK}.mlp.gate", 4, 32, BLOCK, role="router")
    asked = AutoScheme(3.0, OPTIONS, shared_layers=[])
    found = find_space(asked, ground([*experts, beside, router]))
    assert [len(u.layers) for u in found.units] == [6, 1]
    assert router.name not in found.layers


def test_layers_with_rules_are_fixed_and_cost_their_bits() -> None:
    rules = {"layer_config": {"o_proj": "W8A16G32"}, "ignore_layers": ("layers.1.mlp",)}
    found = find_space(AutoScheme(4.0, OPTIONS), ground(**rules))
    assert not any("o_proj" in la or "layers.1.mlp" in la for la in found.layers)
    eight, floats = 2 * 64 * 64, 3 * 96 * 64
    assert found.fixed_bits == eight * 8.5 + floats * 16
    assert found.weights == 2 * (64 * 64 * 3 + 3 * 96 * 64)
    picks = dict.fromkeys(found.layers, "W4A16G32")
    plan = ground(**rules).plan(found.schemes(picks))
    assert bits_of(found, picks, codes_only=False) == pytest.approx(plan.bits_per_weight)
    assert {r.reason for r in plan.rows if r.layer.name in picks} == {"auto_scheme"}
    assert plan.default.name == "W4A16G32"


def test_an_output_head_is_free_only_when_asked_for_and_not_tied() -> None:
    asked = AutoScheme(3.0, OPTIONS)
    assert "lm_head" not in find_space(asked, ground()).layers
    assert "lm_head" in find_space(asked, ground(quant_lm_head=True)).layers
    tied = ground(layers_of(tied=True), quant_lm_head=True)
    assert "lm_head" not in find_space(asked, tied).layers


class Embedding(Sizer):
    """A format that holds embeddings, and knows one type less."""

    def __call__(self, plan) -> PlanSize:
        layers = {r.layer.name: round(r.stored_bits / 8) + 4 for r in plan.quantized}
        two = {n: "no type of 2 bits" for n in layers if plan[n].scheme.weight.bits == 2}
        return PlanSize({k: v for k, v in layers.items() if k not in two}, 1000, two)


def test_a_format_that_holds_embeddings_makes_both_ends_free() -> None:
    found = find_space(AutoScheme(4.5, OPTIONS[1:]), ground(size=Embedding((), {}, {})))
    assert {"model.embed", "lm_head"} <= found.layers.keys()
    tied = find_space(
        AutoScheme(4.5, OPTIONS[1:]), ground(layers_of(tied=True), size=Embedding((), {}, {}))
    )
    assert "model.embed" in tied.layers
    assert "lm_head" not in tied.layers


def test_what_a_format_refuses_is_no_option_and_an_option_for_nothing_is_an_error() -> None:
    size = Embedding((), {}, {})
    with pytest.raises(TunerError, match="option W2A16G32 can be given to no layer: no type of 2"):
        find_space(AutoScheme(4.5, OPTIONS), ground(size=size))


def test_prices_are_bytes_of_the_format() -> None:
    found = find_space(AutoScheme(4.5, OPTIONS[1:]), ground(size=Embedding((), {}, {})))
    q = f"{BLOCK}.attn.q_proj"
    assert found.bits[q, "W4A16G32"] == 8 * (64 * 64 * 4.5 / 8 + 4)
    assert found.code_bits[q, "W4A16G32"] == 64 * 64 * 4
    assert found.fixed_bytes == 1000


def test_a_float_option_costs_sixteen_bits_and_loses_nothing() -> None:
    found = find_space(AutoScheme(8.0, ("W4A16G32", "BF16")), ground())
    q = f"{BLOCK}.attn.q_proj"
    assert found.bits[q, "BF16"] == 64 * 64 * 16
    losses = {(layer, "W4A16G32"): 1.0 for layer in found.layers}
    picks = solved(found, budget_for(found, avg_bits=16.0, codes_only=False), losses)
    assert set(picks.values()) == {"BF16"}
    assert loss_of(picks, losses) == 0
    with pytest.raises(TunerError, match="option BF16 can be given to no layer"):
        find_space(AutoScheme(8.0, ("BF16",)), ground())


@pytest.mark.parametrize(
    ("shared", "said"),
    [
        ([["nothing"]], "matches no layer that is free"),
        ([["q_proj("]], "no regular expression"),
    ],
)
def test_shared_layers_that_mean_nothing_are_refused(shared, said) -> None:
    with pytest.raises(TunerError, match=said):
        find_space(AutoScheme(3.0, OPTIONS, shared_layers=shared), ground())


def test_layers_that_share_need_an_option_in_common() -> None:
    narrow = [
        LayerInfo(f"{BLOCK}.q_proj", 48, 64, BLOCK),  # int layers are multiples of 32
        LayerInfo(f"{BLOCK}.k_proj", 64, 64, BLOCK),
    ]

    class Wide(Sizer):
        def __call__(self, plan) -> PlanSize:
            layers = {r.layer.name: 1 for r in plan.quantized}
            bad = {n: "k" for n in layers if "k_proj" in n and plan[n].scheme.name == "MXFP4"}
            return PlanSize({k: 1 for k in layers if k not in bad}, 0, bad)

    with pytest.raises(TunerError, match="no option fits them all"):
        find_space(AutoScheme(4.0, ("MXFP4", "W4A16G32")), ground(narrow, size=Wide((), {}, {})))


def test_a_group_size_that_does_not_divide_names_the_option() -> None:
    with pytest.raises(SchemeError, match=r"(?s)option W4A16: .*does not divide"):
        find_space(AutoScheme(3.0, ("W2A16G32", "W4A16")), ground())


def test_targets_out_of_reach_say_what_can_be_had() -> None:
    found = find_space(AutoScheme(3.0, OPTIONS), ground())
    with pytest.raises(TunerError, match=r"avg_bits 2.0 is less .*2\.5000 with the cheapest"):
        budget_for(found, avg_bits=2.0, codes_only=False)
    with pytest.raises(TunerError, match=r"avg_bits 9.0 is more .*8\.5000 with the largest"):
        budget_for(found, avg_bits=9.0, codes_only=False)
    with pytest.raises(TunerError, match="target_size 100 is less than the smallest possible"):
        budget_for(found, size=100, codes_only=False)
    fixed = find_space(AutoScheme(3.0, OPTIONS), ground(ignore_layers=("o_proj",)))
    with pytest.raises(TunerError, match="stay as they are count too"):
        budget_for(fixed, avg_bits=2.0, codes_only=False)


@pytest.mark.parametrize("codes_only", [False, True])
def test_an_average_is_kept_and_spent(codes_only) -> None:
    found = find_space(AutoScheme(3.0, OPTIONS), ground())
    losses = {
        (layer, option): (1 + i) / 4 ** found.options[option].weight.bits
        for i, layer in enumerate(found.layers)
        for option in OPTIONS
    }
    for target in (3.0, 3.7, 6.0):
        budget = budget_for(found, avg_bits=target, codes_only=codes_only)
        picks = solved(found, budget, losses)
        assert bits_of(found, picks, codes_only=codes_only) <= target
        assert bits_of(found, picks, codes_only=codes_only) > target - 0.5
        assert all(len({picks[la] for la in unit.layers}) == 1 for unit in found.units)
    points = front_of(found, budget, losses)
    assert points[0].layers == {"W2A16G32": 14}
    assert points[-1].layers == {"W8A16G32": 14}
    assert points[-1].bytes == bytes_for(found, dict.fromkeys(found.layers, "W8A16G32"))


def test_without_a_format_sizes_are_those_of_the_schemes() -> None:
    found = find_space(AutoScheme(3.0, OPTIONS), ground())
    floats = 2 * 96 * 64 * 2  # embedding and head, two bytes each
    assert found.fixed_bytes == floats
    picks = dict.fromkeys(found.layers, "W4A16G32")
    weights = sum(la.weights for la in found.layers.values())
    assert bytes_for(found, picks) == floats + weights * 4.5 / 8
    assert dataclasses.asdict(found)["fixed_bits"] == 0
