from __future__ import annotations

import pytest

from ar_kernels import KernelError
from ar_kernels.hf.config import parse

BASE = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
    "block_name_to_quantize": "model.layers",
}
LAYERS = {
    n: (n,)
    for n in (
        "model.layers.0.q_proj",
        "model.layers.0.down_proj",
        "model.layers.10.q_proj",
        "lm_head",
    )
}


def resolved(**changes):
    return parse({**BASE, **changes}).resolve(LAYERS)


def bits(found):
    return {
        name: None if entry.scheme.weight is None else entry.scheme.weight.bits
        for name, entry in found.items()
    }


def test_layers_in_blocks_get_the_default_and_the_head_does_not() -> None:
    assert bits(resolved()) == {n: 4 for n in LAYERS if n != "lm_head"}


def test_names_and_patterns_override_and_names_win() -> None:
    extra = {
        "model.layers.0.q_proj": {"bits": 8},
        ".*q_proj.*": {"bits": 16, "data_type": "fp"},
        "lm_head": {"bits": 8, "group_size": 32, "sym": True, "data_type": "int"},
    }
    found = bits(resolved(extra_config=extra))
    assert found["model.layers.0.q_proj"] == 8
    assert found["model.layers.10.q_proj"] is None
    assert found["lm_head"] == 8


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:gptq", "gptq"),
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2_g_idx"),
        (None, "gptq"),
    ],
)
def test_a_packing_format_names_a_layout(packing, layout) -> None:
    found = resolved(packing_format=packing)
    assert found["model.layers.0.q_proj"].layout == layout


def test_gptq_rules_change_and_skip() -> None:
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
        "dynamic": {"-:.*down_proj$": {}, r"+:.*layers\.10\..*": {"bits": 8}},
    }
    found = parse(config).resolve(LAYERS)
    assert bits(found)["model.layers.0.down_proj"] is None
    assert bits(found)["model.layers.10.q_proj"] == 8
    assert found["model.layers.0.q_proj"].layout == "gptq_v2_g_idx"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "mystery"}, "unknown quant_method 'mystery'"),
        ({"packing_format": "auto_round:nosuch"}, "unknown packing_format"),
        ({"data_type": "nosuch"}, "data type 'nosuch' is not known here"),
        ({"act_bits": 8, "act_data_type": "nosuch"}, "'nosuch' of the activations is not known"),
        ({"act_bits": 1}, "activations: int has 2 to 8 bits, not 1"),
        ({"extra_config": {"(": {"bits": 8}}}, "nor a regular expression"),
        ({"checkpoint_format": "marlin"}, "unknown checkpoint_format"),
        ({"block_name_to_quantize": 3}, "must be a string or a list"),
    ],
)
def test_what_is_not_understood_is_refused(changes, message) -> None:
    with pytest.raises(KernelError, match=message):
        parse({**BASE, **changes})


@pytest.mark.parametrize("target", ["re:(", "re:?", "re:)"])
def test_a_target_that_is_no_pattern_is_refused(target: str) -> None:
    from ar_kernels.hf.compressed import _matches

    with pytest.raises(KernelError, match="neither a layer name nor a regular expression"):
        _matches(target, "model.layers.0.mlp.up_proj", "Linear")
