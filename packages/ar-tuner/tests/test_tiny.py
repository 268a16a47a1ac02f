from __future__ import annotations

import pytest
import torch

from ar_tuner.blocks import find_blocks
from ar_tuner.registry import find_adapter
from ar_tuner.testing import CannotBuildError, text_types, tiny_config, tiny_model, tiny_rows

pytest.importorskip("transformers")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_rows(2, 8), use_cache=False).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "deepseek_v3", "qwen3_vl"])
def test_a_tiny_model_runs_and_has_blocks(kind: str) -> None:
    model = tiny_model(kind)
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert torch.isfinite(logits(model)).all()
    assert len(find_blocks(model, find_adapter(model.config)).blocks) == 4


def test_the_seed_makes_the_weights_and_the_callers_numbers_go_on() -> None:
    torch.manual_seed(7)
    first = tiny_model("qwen3_moe")
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(logits(first), logits(tiny_model("qwen3_moe")))
    assert not torch.equal(logits(first), logits(tiny_model("qwen3_moe", seed=1)))


def test_no_matrix_is_left_at_zero() -> None:
    model = tiny_model("qwen3_next")
    assert all(p.abs().max() > 0 for p in model.parameters() if p.ndim > 1)


def test_windows_are_smaller_than_the_rows() -> None:
    config = tiny_config("gemma3").text_config
    assert config.sliding_window < tiny_rows().shape[1]
    assert len(set(config.layer_types)) == 2


def test_changes_reach_inner_configurations() -> None:
    config = tiny_config("llava", text_config={"num_hidden_layers": 2})
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (2, 64)


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(CannotBuildError, match="'nothing' is no language model"):
        tiny_model("nothing")
    with pytest.raises(CannotBuildError, match="llama: .*not a multiple"):
        tiny_model("llama", hidden_size=63, head_dim=None)


def test_most_types_are_listed() -> None:
    assert len(text_types()) > 150
