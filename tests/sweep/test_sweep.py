"""Families of every kind of trouble on their way through all steps; `nox -s sweep` has them all."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from ar_tuner.testing.family import check_family
from ar_tuner.testing.known import read_known, surprise

pytest.importorskip("transformers")

HERE = Path(__file__).parent
KNOWN = read_known(HERE / "expected.toml")
TROUBLE = {
    "plain": ("llama", "qwen3", "phi3", "olmo2"),
    "sliding masks": ("gemma2", "gemma3_text", "olmo3", "cohere2", "exaone4"),
    "shared keys and values": ("gemma3n_text", "gemma4_text", "gemma4_unified_text"),
    "features between blocks (DeepStack)": ("qwen3_vl", "granite4_vision"),
    "fused experts": ("qwen3_moe", "mixtral", "glm4_moe"),
    "fused experts, turned": ("gpt_oss", "aria_text"),
    "fused experts, their own layout": ("llama4_text", "granitemoe", "jetmoe", "dbrx"),
    "experts in files otherwise": ("ernie4_5_vl_moe", "longcat_flash", "step3p7"),
    "experts without gates, and state spaces": ("granitemoehybrid",),
    "latent attention": ("deepseek_v3", "deepseek_v4", "minicpm3"),
    "Conv1D": ("gpt2",),
    "parallel blocks": ("gptj", "falcon", "phi", "cohere"),
    "state spaces": ("mamba", "mamba2", "bamba", "zamba2", "jamba"),
    "linear attention": ("qwen3_next", "qwen3_5_text", "lfm2", "rwkv"),
    "tied heads": ("opt", "bloom", "mpt"),
    "cross-attention": ("mllama", "bart"),
    "blocks called many times": ("hrm_text",),
    "eyes": ("llava", "gemma3", "qwen2_5_vl", "idefics3", "llama4"),
    "eyes that have to see": ("blip", "blip-2", "idefics", "instructblip", "kosmos-2"),
    "eyes of timm": ("perception_lm",),
    "token ids in blocks": ("qwen4_exp_text",),
}
CASES = [(trouble, kind) for trouble, kinds in TROUBLE.items() for kind in kinds]


@pytest.mark.parametrize(("trouble", "kind"), CASES, ids=[kind for _, kind in CASES])
def test_a_family_passes_every_step(trouble: str, kind: str) -> None:
    record = check_family(kind)
    assert surprise(record.to_dict(), KNOWN) is None, trouble


JUDGED = (
    *("gemma3", "olmo3", "qwen3_vl", "llava", "mllama", "qwen3_moe", "mixtral", "llama4"),
    *("qwen3_next", "gpt_oss", "deepseek_v3"),
)


@pytest.mark.parametrize("kind", JUDGED)
def test_solved_blocks_lose_no_more_than_rounding_to_nearest(kind: str) -> None:
    record = check_family(kind, options={"algorithm": "second_order"})
    assert record.failed is None, (record.failed, record.error)


def test_the_page_and_the_table_are_of_one_sweep() -> None:
    spec = importlib.util.spec_from_file_location("table", HERE / "table.py")
    assert spec is not None
    assert spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    root = HERE.parents[1]
    data = json.loads((root / table.DATA).read_text(encoding="utf-8"))
    page = (root / table.PAGE).read_text(encoding="utf-8")
    assert page == table.page(data["families"], data["transformers"])
    for row in data["families"]:
        entry = KNOWN.get(row["type"])
        if entry is None or row["passes"]:
            assert row["passes"], row["type"]
            assert entry is None or "unless" in entry, row["type"]
        else:
            assert (row["step"], row["reason"]) == (entry["step"], entry["reason"])


def test_at_least_forty_families_are_tried() -> None:
    assert len({kind for _, kind in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize(
    ("failed", "known", "said"),
    [
        (None, None, None),
        ("walk", "walk", None),
        ("walk", None, "fails at walk: boom"),
        (None, "walk", "remove it"),
        ("tuning", "walk", "at tuning, not at walk"),
    ],
    ids=["passes", "known", "new", "mended", "elsewhere"],
)
def test_only_what_is_not_known_is_a_surprise(failed, known, said) -> None:
    record = {"model_type": "x", "failed": failed, "error": "boom", "place": ""}
    listed = {} if known is None else {"x": {"step": known, "reason": "noise"}}
    found = surprise(record, listed)
    assert found is None if said is None else said in (found or "")


def test_an_entry_holds_where_its_package_is_missing() -> None:
    record = {"model_type": "x", "failed": "build", "error": "boom", "place": ""}
    entry = {"step": "build", "reason": "noise"}
    assert surprise(record, {"x": {**entry, "unless": "no_such_package"}}) is None
    assert "fails at build: boom" in str(surprise(record, {"x": {**entry, "unless": "torch"}}))
    mended = {**record, "failed": None}
    assert surprise(mended, {"x": {**entry, "unless": "torch"}}) is None
    assert "remove it" in str(surprise(mended, {"x": {**entry, "unless": "no_such_package"}}))
