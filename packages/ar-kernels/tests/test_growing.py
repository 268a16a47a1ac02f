"""Caches that grow in place: the same as joined ones, whoever else holds their tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
growing = pytest.importorskip("ar_kernels.hf.growing")


def filled(tokens: int = 5) -> Any:
    """Return a cache of two layers with random tokens."""
    torch.manual_seed(0)
    cache = transformers.DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(2, 3, tokens, 4), torch.randn(2, 3, tokens, 4), layer)
    return cache


def token() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a key and a value."""
    return torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4)


def remember(
    cache: Any, layer: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a token, and return the keys and values of all."""
    return growing.LayerMemory(cache, layer, key.shape, key.dtype).update(key, value)


def test_it_holds_what_joining_gives() -> None:
    ours, plain = filled(), filled()
    for _ in range(2 * growing._LEAST + 3):
        pair = token()
        for layer in range(2):
            found = remember(ours, layer, *pair)
            expected = plain.update(*pair, layer)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ours.get_seq_length() == plain.get_seq_length()


def test_tokens_are_appended_where_there_is_room() -> None:
    cache = filled()
    first, _ = remember(cache, 0, *token())
    second, _ = remember(cache, 0, *token())
    assert first.data_ptr() == second.data_ptr()


def test_what_others_hold_never_changes() -> None:
    cache = filled()
    remember(cache, 0, *token())
    held = cache.layers[0].keys
    before = held.clone()
    other = transformers.DynamicCache()
    other.update(held, cache.layers[0].values, 0)
    other.layers[0].keys, other.layers[0].values = (
        held,
        cache.layers[0].values,
    )  # shared, not copied
    twin = copy.copy(cache.layers[0])
    one, _ = remember(cache, 0, *token())
    one_before = one.clone()
    remember(other, 0, *token())
    cache.layers[0] = twin
    remember(cache, 0, *token())
    assert torch.equal(held, before)
    assert torch.equal(one, one_before)


def test_a_cropped_cache_goes_on_beside_the_whole() -> None:
    cache = filled()
    whole, _ = remember(cache, 0, *token())
    before = whole.clone()
    cache.layers[0].crop(-2)
    key, value = token()
    found, _ = remember(cache, 0, key, value)
    assert torch.equal(whole, before)
    assert torch.equal(found, torch.cat([before[:, :, :4], key], 2))


def test_a_copied_cache_is_its_own() -> None:
    cache = filled()
    remember(cache, 0, *token())
    other = copy.deepcopy(cache)
    mine, _ = remember(cache, 0, *token())
    theirs, _ = remember(other, 0, *token())
    assert not torch.equal(mine, theirs)
    assert torch.equal(mine[:, :, :6], theirs[:, :, :6])


def test_it_goes_in_and_out_of_inference_mode() -> None:
    with torch.inference_mode():
        cache = filled()
        remember(cache, 0, *token())
    assert remember(cache, 0, *token())[0].shape[2] == 7
    with torch.inference_mode():
        assert remember(cache, 0, *token())[0].shape[2] == 8


def test_other_caches_do_it_their_way() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=3, hidden_size=12)
    static = transformers.StaticCache(config=config, max_cache_len=8)
    assert remember(static, 0, *token())[0].shape[2] == 8
    empty = transformers.DynamicCache()
    assert remember(empty, 0, *token())[0].shape[2] == 1
