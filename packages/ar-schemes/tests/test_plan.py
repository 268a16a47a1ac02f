from __future__ import annotations

import pytest

from ar_schemes import (
    LayerInfo,
    LayerRules,
    Scheme,
    SchemeError,
    make_plan,
    matches,
    scheme,
    settled,
)

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


DOWN = f"{BLOCK}.mlp.down_proj"


@pytest.mark.parametrize(
    "pattern", [DOWN, "down_proj", "mlp.down_proj", r"down_.*$", r"layers\.\d+\.mlp\.down"]
)
@pytest.mark.parametrize(
    "rule",
    ["W8A16", 8, {"bits": 8}, scheme("W8A16"), {"bits": 8, "group_size": 128, "sym": True}],
    ids=["name", "bits", "override", "scheme", "dict"],
)
def test_every_form_of_a_layer_rule_means_the_same(pattern, rule) -> None:
    made = plan(layer_config={pattern: rule})
    assert made[DOWN].scheme.weight == scheme("W8A16").weight
    others = [r for r in made.quantized if r.layer.name != DOWN]
    assert others
    assert all(r.scheme.name == "W4A16" for r in others)


def test_sixteen_bits_keep_a_layer_and_other_values_are_no_scheme() -> None:
    assert not plan(layer_config={"down_proj": 16})[DOWN].quantized
    with pytest.raises(SchemeError, match="layer_config 'down_proj': True is no scheme"):
        plan(layer_config={"down_proj": True})
    with pytest.raises(SchemeError, match="layer_config 'down_proj': bits 0 is not allowed"):
        plan(layer_config={"down_proj": 0})


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
        ({"layer_config": {"nothing": {"bits": 2}}}, "layer_config 'nothing' matches none"),
        ({"layer_config": {"mlp": "W9A9"}}, "layer_config 'mlp': unknown scheme 'W9A9'"),
        ({"layer_config": {"mlp": {"bitz": 3}}}, "layer_config 'mlp': unknown scheme key 'bitz'"),
        ({"layer_config": {"mlp": 3.5}}, "layer_config 'mlp': 3.5 is no scheme; use a preset name"),
    ],
    ids=["no-match", "regex", "rule", "scheme", "key", "kind"],
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


def test_layers_that_stay_say_why() -> None:
    layers = (*LAYERS, layer("linear_attn.in_proj_a", keep="gate of linear attention"))
    made = make_plan(layers, LayerRules(scheme("W4A16")))
    assert {r.layer.name: r.reason for r in made.rows if not r.quantized} == {
        "model.embed_tokens": "embedding: stays in 16 bit",
        f"{BLOCK}.mlp.gate": "router: decides where tokens go, stays in 16 bit",
        "lm_head": "output head: not asked for (quant_lm_head)",
        "visual.proj": "outside the decoder blocks",
        f"{BLOCK}.linear_attn.in_proj_a": "gate of linear attention",
    }


def test_a_mixed_preset_gives_each_role_its_scheme() -> None:
    layers = (*LAYERS, layer("mlp.experts.0.up_proj", role="experts"))
    rules = LayerRules(scheme("W4A16_MIXED"), quant_lm_head=True)
    made = make_plan(layers, rules)
    assert made[f"{BLOCK}.self_attn.q_proj"].scheme.name == "W8A16"
    assert made[f"{BLOCK}.mlp.experts.0.up_proj"].scheme.name == "W4A16"
    assert made["lm_head"].scheme.name == "W8A16"
    assert not made[f"{BLOCK}.mlp.gate"].quantized


def test_a_rule_changes_the_default_and_on_a_float_default_the_usual_scheme() -> None:
    asym = make_plan(LAYERS, LayerRules(scheme({"sym": False}), {"q_proj": {"bits": 8}}))
    assert asym[f"{BLOCK}.self_attn.q_proj"].scheme.name == "W8A16G128-asym"
    only = make_plan(LAYERS, LayerRules(scheme("BF16"), {"q_proj": {"group_size": 64}}))
    assert [r.scheme.name for r in only.quantized] == ["W4A16G64"]


def test_a_rule_may_be_a_scheme_and_may_keep_a_layer() -> None:
    made = plan(layer_config={"q_proj": Scheme(name="BF16"), "down_proj": {"bits": 16}})
    assert [r.layer.name for r in made.quantized] == [f"{BLOCK}.mlp.gate_proj"]
    assert made[f"{BLOCK}.self_attn.q_proj"].reason == "layer_config 'q_proj'"


def test_a_rule_reaches_what_would_stay_otherwise() -> None:
    made = plan(layer_config={"visual.proj": "W8A16", "mlp.gate": "W8A16"})
    assert made["visual.proj"].quantized
    assert made[f"{BLOCK}.mlp.gate"].quantized


def test_rows_are_found_by_name_and_by_block() -> None:
    made = plan()
    assert made["lm_head"].layer.rows == 512
    assert [r.layer.name for r in made.of_block(None)] == [
        "model.embed_tokens",
        "lm_head",
        "visual.proj",
    ]
    assert len(made.of_block(BLOCK)) == 4
    assert made.default.name == "W4A16"


def test_tiles_must_divide_rows_too() -> None:
    rules = LayerRules(scheme({"bits": 8, "group_size": [128, 128], "data_type": "fp"}))
    with pytest.raises(SchemeError, match=r"tile128x128 does not divide \[192, 256\]"):
        make_plan((layer("odd", 192, 256),), rules)


def test_one_scale_per_channel_divides_everything() -> None:
    made = make_plan((layer("odd", 96, 416),), LayerRules(scheme({"group_size": -1})))
    assert made[f"{BLOCK}.odd"].quantized


def test_experts_count_as_many_times_as_there_are() -> None:
    many = layer("mlp.experts.up", 64, 128, role="experts", copies=8)
    made = make_plan((many,), LayerRules(scheme("W4A16")))
    assert made.rows[0].stored_bits == 8 * 64 * 128 * 4.125


def test_a_plan_without_blocks_is_all_16_bit() -> None:
    assert make_plan((), LayerRules(scheme("W4A16"))).bits_per_weight == 16.0


def test_settled_rules_mean_the_same_under_any_scheme() -> None:
    given = {"q_proj": 8, "down": {"bits": 3}, "head": "W8A16", "x": scheme("W2A16")}
    rules = settled(LayerRules(scheme("MXFP4"), layer_config=given), scheme("W4A16G64"))
    names = [s.name for s in rules.layer_config.values()]
    assert names == ["W8A16G64", "W3A16G64", "W8A16", "W2A16"]
    assert rules.scheme == scheme("MXFP4")
    with pytest.raises(SchemeError, match="layer_config 'q'"):
        settled(LayerRules(scheme("W4A16"), layer_config={"q": {"bit": 3}}), scheme("W4A16"))


FP8 = scheme("FP8_BLOCK")


def stored(**rules):
    layers = (
        layer("self_attn.q_proj", stored=FP8),
        layer("mlp.gate_proj", stored=FP8),
        LayerInfo("lm_head", 512, 256, None, role="lm_head", stored=FP8),
        LayerInfo("visual.proj", 256, 256, None),
    )
    return make_plan(layers, LayerRules(scheme("W4A16"), **rules))


def test_what_is_kept_is_a_float_to_the_tuner_and_quantized_in_the_files() -> None:
    made = stored(ignore_layers=("self_attn",), keep_source=True)
    assert [r.layer.name for r in made.kept] == [f"{BLOCK}.self_attn.q_proj", "lm_head"]
    assert [r.layer.name for r in made.quantized] == [f"{BLOCK}.mlp.gate_proj"]
    assert made.fallbacks == ()
    row = made["lm_head"]
    assert row.scheme.weight is None
    assert made.as_written()["lm_head"].scheme == FP8
    assert row.stored_bits == 512 * 256 * 8 + 32 * 4 * 2
    assert made.as_written()["visual.proj"].scheme.weight is None


def test_nothing_is_kept_unless_asked() -> None:
    made = stored(ignore_layers=("self_attn",))
    assert made.kept == ()
    assert made["lm_head"].stored_bits == 512 * 256 * 16


def test_the_word_source_keeps_the_layers_it_names() -> None:
    made = stored(layer_config={"mlp": "Source", "visual": "source"})
    assert [r.layer.name for r in made.kept] == [f"{BLOCK}.mlp.gate_proj"]
    assert made["visual.proj"].written.weight is None


def test_bits_of_tiles_over_the_edge_are_those_of_whole_tiles() -> None:
    cut = layer("kv_a_proj", 576, 256, stored=FP8)
    row = make_plan([cut], LayerRules(scheme("W4A16"), {"kv_a_proj": "source"})).rows[0]
    assert row.bits_per_weight == pytest.approx(8 + 32 / 128**2)
