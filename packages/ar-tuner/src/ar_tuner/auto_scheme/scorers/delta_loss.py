"""Scorer `delta_loss`: the gradient at the quantized model times the change, as auto-round does it.

For each option the whole model is quantized with it, the loss on the text is differentiated, and a
layer scores sum |g * (W - W')| over its weights, where g is the gradient of the quantized weight
W'; options that quantize activations add the same of each layer's input. One pass per option.
First order and without signs, so the numbers rank layers but are no losses.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.activation import fake_quant_activation
from ar_tuner.auto_scheme.candidates import Inputs, ranges_of
from ar_tuner.auto_scheme.sweep import Listener, Sweep, sweep, sweep_whole
from ar_tuner.blocks import weight_of, weights_of
from ar_tuner.parts import assembled
from ar_tuner.watching import watching

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from ar_schemes import Scheme
    from ar_tuner.auto_scheme.candidates import Candidate
    from ar_tuner.auto_scheme.scorers.base import Scores, ScoreTask, Values
    from ar_tuner.parts import WeightRef
    from ar_tuner.watching import Watch


class DeltaLoss:
    """Scorer `delta_loss`."""

    name = "delta_loss"
    calibrated = False

    def values(self, task: ScoreTask) -> dict[str, Values]:
        """Return the sum over the batches for each layer and option."""
        out: dict[str, Values] = {layer: dict(v) for layer, v in task.known.items()}
        options = dict.fromkeys(o for layer in task.layers for o in task.missing(layer))
        for number, option in enumerate(options):
            found = self._option(task, option)
            for layer, value in found.items():
                out[layer] = {**out.get(layer, {}), option: (value,)}
                task.save(layer, out[layer])
            task.report(number + 1, len(options))
        return out

    def scores(self, values: Mapping[str, Values], tokens: int) -> Scores:
        """Return the sums per token."""
        return {
            (layer, option): value[0] / tokens
            for layer, named in values.items()
            for option, value in named.items()
        }

    def _option(self, task: ScoreTask, option: str) -> dict[str, float]:
        listener = _DeltaListener(task, option)
        passing = Sweep(task.model, task.adapter, task.blocks, task.batches)
        with listener.outside():
            (sweep if task.by_block else sweep_whole)(passing, listener)
        return listener.sums


class _DeltaListener(Listener):
    """Runs the model under one option and sums up what the gradients say of it."""

    def __init__(self, task: ScoreTask, option: str) -> None:
        self._task = task
        self._option = option
        self._candidates: dict[str, Candidate] = {}
        self._ranges: dict[str, Tensor] = {}
        self._made: set[int] = set()
        self._floats: dict[str, Tensor] = {}
        self.sums: dict[str, float] = {}
        self._schemes = [self._schemes_in(block.name) for block in task.blocks]
        self._refs = [
            weights_of(block, list(named))
            for block, named in zip(task.blocks, self._schemes, strict=True)
        ]
        self._outer = {
            name: task.model.get_submodule(name)
            for name, layer in task.layers.items()
            if layer.block is None and option in task.open_to[name]
        }
        self._inputs = self._gather()

    def _schemes_in(self, block: str) -> dict[str, Scheme]:
        task, option = self._task, self._option
        return {
            name: task.open_to[name][option]
            for name, layer in task.layers.items()
            if layer.block == block and option in task.open_to[name]
        }

    def _gather(self) -> list[Inputs]:
        """Return what flows through the float model: importance and ranges come from there."""
        task = self._task
        inputs = [Inputs() for _ in task.blocks]
        with contextlib.ExitStack() as stack, torch.no_grad():
            for block, refs, found in zip(task.blocks, self._refs, inputs, strict=True):
                stack.enter_context(found.gathered(block.module, refs))
            entry = task.adapter.entry(task.model)
            for rows in task.batches:
                entry(**task.adapter.inputs(task.model, rows))
        return inputs

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Quantize the layers outside the blocks in place, as long as the context lasts."""
        for name, module in self._outer.items():
            which = self._task.open_to[name][self._option]
            self._candidates[name] = self._task.maker.outside(module, name, which)
            weight = weight_of(module)
            self._floats[name] = weight.data
            weight.data = self._candidates[name].weight().to(weight.dtype)
            weight.requires_grad_()
        try:
            yield
        finally:
            for name, module in self._outer.items():
                weight = weight_of(module)
                weight.requires_grad = False
                weight.grad = None
                weight.data = self._floats[name]

    def weights(self, index: int) -> dict[str, Tensor]:
        """Return the quantized weights of a block."""
        block = self._task.blocks[index]
        if index not in self._made:
            schemes = self._schemes[index]
            open_to = {layer: {self._option: which} for layer, which in schemes.items()}
            made = self._task.maker.of_block(block, open_to, self._inputs[index])
            self._candidates |= {layer: candidate for (layer, _), candidate in made.items()}
            self._ranges |= ranges_of(schemes, self._inputs[index])
            self._made.add(index)
        pairs = ((ref, self._candidates[ref.layer].weight()) for ref in self._refs[index])
        return assembled(pairs, block.module.get_parameter)

    def wanted(self, index: int) -> dict[str, Tensor]:
        """Ask for the gradients of the quantized weights."""
        return self.weights(index)

    @contextlib.contextmanager
    def running(self, index: int, *, back: bool) -> Iterator[None]:
        """Quantize activations; on the way back, watch their gradients too."""
        block = self._task.blocks[index].module
        schemes = self._schemes[index]
        refs = [r for r in self._refs[index] if schemes[r.layer].activation is not None]
        with watching(block, refs, self._input_watch(schemes, back=back)):
            yield

    def loss(self, logits: Tensor, rows: Tensor, number: int) -> Tensor:  # noqa: ARG002
        """Return the cross entropy of the text itself, a mean over its tokens."""
        flat = logits[:, :-1].float().reshape(-1, logits.shape[-1])
        labels = rows[:, 1:].reshape(-1).to(flat.device)
        return torch.nn.functional.cross_entropy(flat, labels) * labels.numel()

    def felt(self, index: int, number: int, gradients: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        """Multiply the gradients of a batch by the change."""
        block = self._task.blocks[index].module
        for ref in self._refs[index]:
            if ref.parameter in gradients:
                weight = ref.view(block.get_parameter(ref.parameter).detach()).float()
                self._add(ref.layer, ref.view(gradients[ref.parameter]), weight)

    def sent(self, number: int) -> None:  # noqa: ARG002
        """Do the same for the layers outside the blocks."""
        for name, module in self._outer.items():
            weight = weight_of(module)
            if weight.grad is not None:
                self._add(name, weight.grad, self._floats[name].float())
                weight.grad = None

    def done(self, index: int) -> None:
        """Let the candidates of a block go."""
        for ref in self._refs[index]:
            self._candidates.pop(ref.layer, None)

    def _add(self, layer: str, gradient: Tensor, weight: Tensor) -> None:
        change = self._candidates[layer].weight() - weight
        self.sums[layer] = self.sums.get(layer, 0.0) + float(
            (gradient.float() * change).abs().sum()
        )

    def _input_watch(self, schemes: Mapping[str, Scheme], *, back: bool) -> Watch:
        def watch(refs: Sequence[WeightRef], x: Tensor) -> Tensor:
            layer = refs[0].layer
            spec = schemes[layer].activation
            assert spec is not None
            quantized = fake_quant_activation(x, spec, static=self._ranges.get(layer))
            quantized = quantized.to(x.dtype)
            if back:
                if not quantized.requires_grad:
                    quantized.requires_grad_()
                error = (quantized.detach() - x.detach()).float()

                def meet(gradient: Tensor) -> None:
                    # projections of one expert are one product: each has its share of the change
                    moved = float((gradient.float() * error).abs().sum()) / len(refs)
                    for ref in refs:
                        self.sums[ref.layer] = self.sums.get(ref.layer, 0.0) + moved

                quantized.register_hook(meet)
            return quantized

        return watch
