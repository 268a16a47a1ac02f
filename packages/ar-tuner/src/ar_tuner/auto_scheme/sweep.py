"""Forward and backward through a model block by block, with the gradients of chosen weights.

Every row of text runs the model's own forward, suspended before each block (see `ar_tuner.walk`);
what a block was given is kept, its graph is not. On the way back each block is run again with its
graph and the gradient that came from behind. So one block's graph is alive at a time, whatever the
depth of the model; masks, position tables and what the model computes between its blocks stay in
the frames' own graph.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from ar_tuner.errors import TunerError
from ar_tuner.walk import suspended, trace_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.blocks import Block
    from ar_tuner.walk import Call, Frame


@dataclass(frozen=True)
class Sweep:
    """A model and the texts that go through it, a batch of token rows [B, T] at a time."""

    model: nn.Module
    adapter: ModelAdapter
    blocks: tuple[Block, ...]
    batches: tuple[Tensor, ...]


class Listener:
    """What is done on the way; the defaults do nothing.

    A block is known by its index, a batch by its number. On the way forth `weights` and `running`
    are asked for, at its end `loss` for every batch; then, block by block from the last, `wanted`,
    for every batch `running` and `felt`, and `done`.
    """

    def weights(self, index: int) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Return the weights that a block runs with instead of its own, by parameter name."""
        return {}

    def running(self, index: int, *, back: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return a context in which a block runs, on the way forth or back."""
        return contextlib.nullcontext()

    def loss(self, logits: Tensor, rows: Tensor, number: int) -> Tensor:
        """Return what is differentiated, a scalar, for the logits [B, T, V] of a batch."""
        raise NotImplementedError

    def sent(self, number: int) -> None:
        """Take note that a batch has sent gradients to what lies outside the blocks."""

    def wanted(self, index: int) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Return the weights of a block whose gradients are wanted, by parameter name."""
        return {}

    def arrived(self, index: int, number: int, gradients: Sequence[Tensor | None]) -> None:
        """Take the gradients of what a block gave for a batch, tensor by tensor (`sweep` only)."""

    def felt(self, index: int, number: int, gradients: Mapping[str, Tensor]) -> None:
        """Take the gradients of the wanted weights of a block for a batch."""

    def done(self, index: int) -> None:
        """Take note that a block has felt every batch."""


@dataclass
class _Stop:
    """One call of a block: what it was given, and the leaves that it answered with."""

    call: Call
    leaves: list[Tensor]


def sweep(passing: Sweep, listener: Listener) -> None:
    """Run every batch forth and back, one block's graph at a time.

    Raises:
        TunerError: the model gives no logits.
    """
    entry = passing.adapter.entry(passing.model)
    modules = [b.module for b in passing.blocks]
    inputs = [passing.adapter.inputs(passing.model, rows) for rows in passing.batches]
    order = trace_calls(entry, modules, inputs[0])
    tape = _forth(passing, listener, order, inputs)
    left = Counter(order)
    for position in reversed(range(len(order))):
        index = order[position]
        left[index] -= 1
        _back(passing, listener, index, tape.pop())
        if left[index] == 0:
            listener.done(index)


def _forth(
    passing: Sweep,
    listener: Listener,
    order: Sequence[int],
    inputs: Sequence[Mapping[str, object]],
) -> list[list[_Stop]]:
    entry = passing.adapter.entry(passing.model)
    modules = [b.module for b in passing.blocks]
    tape: list[list[_Stop]] = []
    with suspended(entry, modules, inputs, grad=True) as frames:
        for position, index in enumerate(order):
            tape.append([])
            weights = listener.weights(index)
            last = position == len(order) - 1
            for number, frame in enumerate(frames):
                stop, answer = _answer(listener, modules[index], index, frame, weights)
                tape[-1].append(stop)
                frame.resume(answer)
                if last:
                    _ended(passing, listener, number, frame)
    return tape


def _answer(
    listener: Listener, block: nn.Module, index: int, frame: Frame, weights: Mapping[str, Tensor]
) -> tuple[_Stop, object]:
    call = frame.call
    assert call is not None
    assert call.index == index
    with torch.no_grad(), listener.running(index, back=False):
        output = functional_call(block, dict(weights), call.args, call.kwargs)
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    answer = mapped(output, leaf)
    return _Stop(call, leaves), answer


def _ended(passing: Sweep, listener: Listener, number: int, frame: Frame) -> None:
    """Differentiate what lies behind the last block, as soon as a batch has come so far."""
    logits = logits_of(frame.output)
    frame.output = None
    loss = listener.loss(logits, passing.batches[number], number)
    torch.autograd.backward(loss, retain_graph=True)
    listener.sent(number)


def _back(passing: Sweep, listener: Listener, index: int, stops: list[_Stop]) -> None:
    block = passing.blocks[index].module
    wanted = {n: w.detach().requires_grad_() for n, w in listener.wanted(index).items()}
    weights = {**listener.weights(index), **wanted}
    for number, stop in enumerate(stops):
        fresh: dict[int, tuple[Tensor, Tensor]] = {}

        def leaf(tensor: Tensor, known: dict[int, tuple[Tensor, Tensor]] = fresh) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            copy = tensor.detach().requires_grad_()
            return known.setdefault(id(tensor), (tensor, copy))[1]

        args, kwargs = mapped((stop.call.args, stop.call.kwargs), leaf)
        with torch.enable_grad(), listener.running(index, back=True):
            output = functional_call(block, weights, args, kwargs)
        arrived = [leaf.grad for leaf in stop.leaves]
        listener.arrived(index, number, arrived)
        _differentiate(_floats(output), arrived)
        listener.felt(index, number, {n: w.grad for n, w in wanted.items() if w.grad is not None})
        for weight in wanted.values():
            weight.grad = None
        _differentiate(
            [tensor for tensor, _ in fresh.values()], [copy.grad for _, copy in fresh.values()]
        )
        listener.sent(number)


def _floats(output: object) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.append(tensor)
        return tensor

    mapped(output, note)
    return found


def _differentiate(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Send gradients back from tensors; those that nothing came for are left out."""
    pairs = [
        (o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad
    ]
    if pairs:
        # kept: several blocks may hang on one thing that was computed before all of them
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs], retain_graph=True)


def sweep_whole(passing: Sweep, listener: Listener) -> None:
    """Do what `sweep` does with one graph of the whole model: faster, and as large as it is deep.

    Raises:
        TunerError: the model gives no logits.
    """
    entry = passing.adapter.entry(passing.model)
    names = {id(p): name for name, p in entry.named_parameters(remove_duplicate=False)}

    def named(index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        block = passing.blocks[index].module
        return {names[id(block.get_parameter(n))]: w for n, w in weights.items()}

    indices = range(len(passing.blocks))
    replaced = {k: w for i in indices for k, w in named(i, listener.weights(i)).items()}
    with torch.no_grad(), _all_running(listener, indices, back=False):
        for rows in passing.batches:
            functional_call(
                entry, replaced, kwargs=dict(passing.adapter.inputs(passing.model, rows))
            )
    wanted = {
        i: {n: w.detach().requires_grad_() for n, w in listener.wanted(i).items()}
        for i in reversed(indices)
    }
    weights = {**replaced, **{k: w for i, ws in wanted.items() for k, w in named(i, ws).items()}}
    for number, rows in enumerate(passing.batches):
        with torch.enable_grad(), _all_running(listener, indices, back=True):
            inputs = dict(passing.adapter.inputs(passing.model, rows))
            logits = logits_of(functional_call(entry, weights, kwargs=inputs))
        torch.autograd.backward(listener.loss(logits, rows, number))
        for i, leaves in wanted.items():
            listener.felt(i, number, {n: w.grad for n, w in leaves.items() if w.grad is not None})
            for weight in leaves.values():
                weight.grad = None
        listener.sent(number)
    for i in wanted:
        listener.done(i)


@contextlib.contextmanager
def _all_running(listener: Listener, indices: range, *, back: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for index in indices:
            stack.enter_context(listener.running(index, back=back))
        yield


def logits_of(output: object) -> Tensor:
    """Return the logits [B, T, V] in a model's output.

    Raises:
        TunerError: there are none.
    """
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)):
        found = output[0]
    found = output if isinstance(output, Tensor) else found
    if not isinstance(found, Tensor) or found.ndim != 3:  # noqa: PLR2004
        msg = (
            f"the model returned {type(output).__name__} without logits [B, T, V], and layers are "
            "scored by what it predicts. Give it its output head, or choose the schemes yourself "
            "with layer_config."
        )
        raise TunerError(msg)
    return found


def mapped(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return arguments or outputs with every tensor in them replaced."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(v, function) for v in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(v, function) for v in tree)
    if isinstance(tree, dict):
        return type(tree)((k, mapped(v, function)) for k, v in tree.items())
    return tree
