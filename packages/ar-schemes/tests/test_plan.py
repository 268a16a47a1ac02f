from __future__ import annotations

import pytest

from ar_schemes import LayerInfo, LayerRules, SchemeError, make_plan, matches, scheme

BLOCK = "model.layers.0"


def layer(name: str, rows: int = 256, columns: int = 256, **changes) -> LayerInfo:
    return LayerInfo(f"{BLOCK}.{name}", rows, columns, BLOCK, **changes)


LAYERS = (
    LayerInfo("model.embed_tokens", 512, 256, None, role="embedding"),
    layer("self_attn.q_proj"),
    layer("mlp.gate", 32, 256, role="router"),
    layer("mlp.gate_proj"),
    layer("mlp.down_proj", 256, 768),
    LayerInfo("lm_head", 512, 256, None, role="lm_head"),
    LayerInfo("visual.proj", 256, 256, None),
)


def plan(**rules):
    return make_plan(LAYERS, LayerRules(scheme(rules.pop("scheme", "W4A16")), **rules))


def test_every_row_has_a_reason() -> None:
    made = plan()
    assert [r.layer.name for r in made.quantized] == [
        f"{BLOCK}.{n}" for n in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    assert all(r.reason for r in made.rows)
    assert [r.layer.name for r in made.fallbacks] == [f"{BLOCK}.mlp.gate"]
    with pytest.raises(KeyError):
        made["nothing"]


def test_a_name_beats_a_pattern_and_the_last_pattern_wins() -> None:
    made = plan(
        layer_config={
            f"{BLOCK}.mlp.down_proj": "W8A16",
            "mlp": {"bits": 2},
            r"(gate|down)_proj$": "W3A16",
        }
    )
    assert made[f"{BLOCK}.mlp.down_proj"].scheme.name == "W8A16"
    assert made[f"{BLOCK}.mlp.gate_proj"].scheme.name == "W3A16"
    assert "layer_config" in made[f"{BLOCK}.mlp.gate_proj"].reason


def test_ignored_layers_stay_whatever_else_is_said() -> None:
    made = plan(ignore_layers=("down_proj",), layer_config={"down_proj": "W8A16"})
    assert not made[f"{BLOCK}.mlp.down_proj"].quantized
    assert "ignore_layers" in made[f"{BLOCK}.mlp.down_proj"].reason


def test_the_head_is_quantized_only_when_asked_and_never_when_tied() -> None:
    assert not plan()["lm_head"].quantized
    assert plan(quant_lm_head=True)["lm_head"].quantized
    tied = LayerInfo("lm_head", 512, 256, None, role="lm_head", tied=True)
    made = make_plan((layer("x"), tied), LayerRules(scheme("W4A16"), quant_lm_head=True))
    assert not made["lm_head"].quantized
    assert "embedding" in made["lm_head"].reason


def test_a_shape_that_no_reader_packs_stays_with_a_reason() -> None:
    made = make_plan((layer("odd", 255, 256),), LayerRules(scheme("W4A16")))
    assert not made[f"{BLOCK}.odd"].quantized
    assert "multiple of 32" in made[f"{BLOCK}.odd"].reason


def test_group_sizes_that_do_not_divide_are_listed_together() -> None:
    with pytest.raises(SchemeError, match="3 layers cannot be quantized") as caught:
        plan(layer_config={".*_proj$": {"group_size": 160}})
    for name in ("q_proj", "gate_proj", "down_proj"):
        assert name in str(caught.value)
    assert "sizes that do" in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"ignore_layers": ("nothing",)}, "ignore_layers 'nothing' matches none of the 7 layers"),
        ({"layer_config": {"(": "W4A16"}}, "is no regular expression"),
        ({"layer_config": {"mlp": "W9A9"}}, "unknown scheme 'W9A9'"),
    ],
    ids=["no-match", "regex", "scheme"],
)
def test_a_rule_with_a_mistake_is_refused(rules, message) -> None:
    with pytest.raises(SchemeError, match=message):
        plan(**rules)


def test_bits_per_weight_weigh_layers_by_their_size() -> None:
    made = make_plan(
        (layer("a", 128, 128), layer("b", 128, 384)),
        LayerRules(scheme("W4A16"), layer_config={"a": "W8A16"}),
    )
    assert made.bits_per_weight == pytest.approx((8.125 + 3 * 4.125) / 4)


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("layers.1", "model.layers.10.mlp", False),
        (r"layers\.1\.", "model.layers.1.mlp", True),
    ],
)
def test_a_pattern_means_whole_parts_of_a_name(pattern, name, hit) -> None:
    assert matches(pattern, name) is hit
