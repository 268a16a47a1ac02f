from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ar_tuner import TunerError
from ar_tuner.adapters import GenericAdapter
from ar_tuner.auto_scheme.sweep import Listener, Sweep, logits_of, sweep, sweep_whole
from ar_tuner.blocks import Block, find_blocks


class Gradients(Listener):
    """Collects the gradients of every weight, by (block, batch, parameter)."""

    def __init__(self, blocks, outside=()) -> None:
        self.blocks = blocks
        self.outside = outside
        self.found: dict[object, torch.Tensor] = {}
        self.finished: list[int] = []

    def loss(self, logits, rows, number):
        flat = logits.reshape(-1, logits.shape[-1])
        return nn.functional.cross_entropy(flat, rows.reshape(-1)) * (number + 1)

    def wanted(self, index):
        return {n: p.detach() for n, p in self.blocks[index].module.named_parameters()}

    def felt(self, index, number, gradients):
        for name, gradient in gradients.items():
            key = (index, number, name)
            self.found[key] = self.found.get(key, 0) + gradient

    def sent(self, number):
        for weight in self.outside:
            if weight.grad is not None:
                key = (id(weight), number)
                self.found[key] = self.found.get(key, 0) + weight.grad
                weight.grad = None

    def done(self, index):
        self.finished.append(index)


def plain(model, listener, batches, blocks):
    """The same by one ordinary backward pass per batch."""
    out = {}
    weights = {(i, n): p for i, b in enumerate(blocks) for n, p in b.module.named_parameters()}
    for number, rows in enumerate(batches):
        for weight in (*weights.values(), *listener.outside):
            weight.requires_grad_()
            weight.grad = None
        listener.loss(model(rows, use_cache=False).logits, rows, number).backward()
        out |= {(i, number, n): p.grad.clone() for (i, n), p in weights.items()}
        out |= {(id(w), number): w.grad.clone() for w in listener.outside}
        for weight in (*weights.values(), *listener.outside):
            weight.requires_grad = False
            weight.grad = None
    return out


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2", "mistral", "qwen3_moe"])
@pytest.mark.parametrize("run", [sweep, sweep_whole])
def test_gradients_are_those_of_one_backward_pass(kind, run, model, rows) -> None:
    made = model(kind)
    blocks = find_blocks(made, GenericAdapter()).blocks
    batches = rows[:3].split(2)
    embedding = made.get_input_embeddings().weight  # tied to the head in some of these
    listener = Gradients(blocks, outside=(embedding,))
    embedding.requires_grad_()
    run(Sweep(made, GenericAdapter(), blocks, batches), listener)
    embedding.requires_grad = False
    wanted = plain(made, listener, batches, blocks)
    assert listener.finished == [1, 0]
    assert listener.found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(listener.found[key], gradient, rtol=1e-4, atol=1e-6)


def test_only_what_is_wanted_is_differentiated(model, rows) -> None:
    made = model()
    blocks = find_blocks(made, GenericAdapter()).blocks

    class Last(Gradients):
        def wanted(self, index):
            return super().wanted(index) if index == 1 else {}

    listener = Last(blocks)
    sweep(Sweep(made, GenericAdapter(), blocks, rows[:1].split(1)), listener)
    assert {key[0] for key in listener.found} == {1}
    assert all(not p.requires_grad and p.grad is None for p in made.parameters())


class Shared(nn.Module):
    """Calls one block twice, and computes between the calls from both their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids, use_cache=False):  # noqa: ARG002
        first = self.layers[0](self.embed(input_ids))
        second = self.layers[1](first * first.mean(-1, keepdim=True))
        third = self.layers[0](second.tanh() + first)
        return SimpleNamespace(logits=self.head(third + second * first))


def test_blocks_called_twice_and_paths_around_blocks_keep_their_gradients() -> None:
    torch.manual_seed(0)
    made = Shared().requires_grad_(requires_grad=False)
    blocks = tuple(Block(f"layers.{i}", m) for i, m in enumerate(made.layers))
    batches = torch.randint(0, 16, (3, 5)).split(1)
    listener = Gradients(blocks)
    sweep(Sweep(made, GenericAdapter(), blocks, batches), listener)
    wanted = plain(made, listener, batches, blocks)
    for key, gradient in wanted.items():
        torch.testing.assert_close(listener.found[key], gradient)
    assert listener.finished == [1, 0]


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(TunerError, match="SimpleNamespace without logits"):
        logits_of(SimpleNamespace(last_hidden_state=torch.zeros(1, 2, 3)))
    assert logits_of((torch.zeros(1, 2, 3), None)).shape == (1, 2, 3)
    assert logits_of(torch.zeros(1, 2, 3)).shape == (1, 2, 3)


def test_a_listener_has_to_say_what_is_differentiated() -> None:
    with pytest.raises(NotImplementedError):
        Listener().loss(torch.zeros(1), torch.zeros(1), 0)
