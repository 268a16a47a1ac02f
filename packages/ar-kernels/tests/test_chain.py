"""Blocks run ahead as one: the same numbers, whatever happens between two of them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from ar_kernels import QuantLinear, data_type
from ar_kernels.hf import decoding
from ar_kernels.native import library
from ar_schemes import Granularity, Span, TensorSpec

transformers = pytest.importorskip("transformers")
chain = pytest.importorskip("ar_kernels.hf.chain")
pytestmark = pytest.mark.skipif(
    library.missing() is not None, reason="the native library is not built"
)
BLOCKS = 3
PROMPT = torch.arange(12).reshape(2, 6)
TOKENS = torch.tensor([[3], [5]])


@pytest.fixture
def model() -> Any:
    """Return a model whose blocks form one chain."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=128,
    )
    made = transformers.Qwen3ForCausalLM(config).eval()
    spec, numbers = TensorSpec(granularity=Granularity(Span.GROUP, (32,))), data_type("int")
    for name, module in list(made.model.named_modules()):
        if type(module) is nn.Linear:
            weight = 4 * module.weight.data
            found = numbers.quantize(weight, spec, numbers.parameters(weight, spec))
            layer = QuantLinear.from_weight(found, layout="gptq", dtype=torch.float32)
            layer.prepare("cpu_native")
            made.model.set_submodule(name, layer)
    assert decoding.speed_up(made)["blocks as one step"] == BLOCKS
    return made


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the calls of every chain that is run."""
    seen: list[int] = []
    run = chain.run_calls

    def counted(calls: Any) -> None:
        seen.append(len(calls))
        run(calls)

    monkeypatch.setattr(chain, "run_calls", counted)
    return seen


def told(model: Any, steps: int = 6, ids: torch.Tensor = PROMPT, cache: Any = None) -> torch.Tensor:
    """Return the logits of some tokens behind a prompt: [steps, B, vocabulary]."""
    with torch.inference_mode():
        if cache is None:
            cache = model(ids, use_cache=True).past_key_values
        return torch.stack(
            [
                model(TOKENS[: len(ids)] + i, past_key_values=cache).logits[:, 0]
                for i in range(steps)
            ]
        )


def alone(model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> torch.Tensor:
    """Return what the model tells where no chain is run."""
    with monkeypatch.context() as patch:
        patch.setattr(chain.Chain, "output", lambda *_: None)
        return told(model, **options)


def test_it_runs_from_the_second_token_on(
    model: Any, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(model, monkeypatch)
    assert not runs
    assert torch.equal(told(model), expected)
    assert len(runs) == 5
    assert torch.equal(told(model, ids=PROMPT[:1]), alone(model, monkeypatch, ids=PROMPT[:1]))


def test_more_tokens_than_there_is_room_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(model, monkeypatch, steps=80)
    assert torch.equal(told(model, steps=80), expected)


def test_what_is_added_between_blocks_counts(
    model: Any, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    told(model)

    def steer(_: nn.Module, __: Any, out: torch.Tensor) -> None:
        out.add_(0.5)  # in place: the tensor is the one that was given

    hook = model.model.layers[1].register_forward_hook(steer)
    steered = told(model)
    expected = alone(model, monkeypatch)
    assert torch.equal(steered, expected)
    hook.remove()
    assert not torch.equal(told(model), expected)
    runs.clear()
    assert torch.equal(told(model), alone(model, monkeypatch))
    assert runs


def test_another_type_between_blocks_is_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told(model)
    first = model.model.layers[0]
    narrow = first.register_forward_hook(lambda *given: given[2].bfloat16())
    # what follows multiplies in float32 again
    wide = model.model.layers[1].register_forward_pre_hook(lambda _, given: (given[0].float(),))
    assert torch.equal(told(model), alone(model, monkeypatch))
    narrow.remove()
    wide.remove()


def test_a_hook_in_a_later_block_is_called(model: Any) -> None:
    told(model)
    calls = []
    model.model.layers[2].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    told(model, steps=4)
    assert len(calls) == 5


def test_caches_take_turns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        caches = [model(PROMPT + i, use_cache=True).past_key_values for i in range(2)]
        found = torch.stack([told(model, steps=1, cache=c) for _ in range(4) for c in caches])
        caches = [model(PROMPT + i, use_cache=True).past_key_values for i in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(chain.Chain, "output", lambda *_: None)
        expected = torch.stack([told(model, steps=1, cache=c) for _ in range(4) for c in caches])
    assert torch.equal(found, expected)


def test_a_cropped_and_a_shared_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def follow() -> torch.Tensor:
        with torch.inference_mode():
            cache = model(PROMPT, use_cache=True).past_key_values
            told(model, steps=4, cache=cache)
            other = transformers.DynamicCache()
            for i, layer in enumerate(cache.layers):
                other.update(layer.keys, layer.values, i)
                other.layers[i].keys, other.layers[i].values = layer.keys, layer.values
            cache.crop(-2)
            return torch.stack([told(model, steps=3, cache=c) for c in (cache, other)])

    found = follow()
    with monkeypatch.context() as patch:
        patch.setattr(chain.Chain, "output", lambda *_: None)
        assert torch.equal(found, follow())


def test_a_copied_cache_goes_its_own_way(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def follow() -> torch.Tensor:
        with torch.inference_mode():
            cache = model(PROMPT, use_cache=True).past_key_values
            told(model, steps=3, cache=cache)
            other = copy.deepcopy(cache)
            first = told(model, steps=3, cache=cache)
            return torch.stack([first, told(model, steps=3, cache=other)])

    found = follow()
    assert torch.equal(found[0], found[1])
    with monkeypatch.context() as patch:
        patch.setattr(chain.Chain, "output", lambda *_: None)
        assert torch.equal(found, follow())


def test_a_pass_that_ends_early_leaves_nothing_behind(model: Any) -> None:
    expected = told(model, steps=4)
    with torch.inference_mode():
        cache = model(PROMPT, use_cache=True).past_key_values
        told(model, steps=2, cache=cache)

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            told(model, steps=1, cache=cache)
        hook.remove()
        assert [layer.keys.shape[2] for layer in cache.layers] == [9, 8, 8]
    assert torch.equal(told(model, steps=4), expected)


def test_copies_run_alone(model: Any, runs: list[int]) -> None:
    expected = told(model)
    runs.clear()
    assert torch.equal(told(copy.deepcopy(model)), expected)
    assert not runs
    assert pickle.loads(pickle.dumps(model.model.layers[0].ar_chain))._blocks == ()
