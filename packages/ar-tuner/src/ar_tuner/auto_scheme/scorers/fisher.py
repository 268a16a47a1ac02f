"""Scorer `fisher`: the curvature of the model's own predictions, all options in one backward pass.

The divergence of a model whose weights change by D is 1/2 E[(g . D)^2] to second order, where g is
the gradient of the log probability of labels that the model itself draws: its true Fisher
information. One backward pass per batch of rows gives g for every layer, and D of every option
meets it there, so options cost one product each.

Two estimates come of it. `rows` takes the rows of a matrix for independent, as rounding errors
are: E[sum over rows of (g_r . D_r)^2], little noise, but blind to errors that rows have in common
(the shrinkage of few bits). `whole` is E[(g . D)^2] itself, without bias and with the noise of one
number per batch. `blended` moves the first towards the second as far as their differences exceed
the noise (empirical Bayes, Efron and Morris 1973, on logarithms).

Activations that an option quantizes add 1/2 E[sum of (h_ti d_ti)^2] with the gradient h and the
error d of each element of what the layers are given; layers that are given the same share it out.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.activation import fake_quant_activation
from ar_tuner.auto_scheme.candidates import Inputs, ranges_of
from ar_tuner.auto_scheme.sweep import Listener, Sweep, sweep, sweep_whole
from ar_tuner.blocks import weight_of, weights_of
from ar_tuner.logits import drawn_loss
from ar_tuner.watching import watching

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from ar_tuner.auto_scheme.candidates import Candidate
    from ar_tuner.auto_scheme.scorers.base import Scores, ScoreTask, Values
    from ar_tuner.parts import WeightRef
    from ar_tuner.watching import Watch

    Key = tuple[str, str]

TINY = 1e-30


class Fisher:
    """Scorer `fisher`."""

    name = "fisher"
    calibrated = True

    def values(self, task: ScoreTask) -> dict[str, Values]:
        """Return (rows, whole, relative variance of whole, activations), sums over the tokens."""
        listener = _FisherListener(task)
        passing = Sweep(task.model, task.adapter, task.blocks, task.batches)
        with listener.outside():
            (sweep if task.by_block else sweep_whole)(passing, listener)
        return listener.out

    def scores(self, values: Mapping[str, Values], tokens: int) -> Scores:
        """Return half the blended quadratic form per token, activations added."""
        out: Scores = {}
        options = dict.fromkeys(o for named in values.values() for o in named)
        for option in options:
            named = {layer: found[option] for layer, found in values.items() if option in found}
            weights = blended({layer: v[:3] for layer, v in named.items()})
            for layer, value in named.items():
                out[layer, option] = 0.5 * (weights[layer] + value[3]) / tokens
        return out


def blended(values: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """Return, by layer, `rows` moved towards `whole` as far as the noise allows.

    `values`: (rows, whole, relative variance of whole) by layer.
    """
    usable = {k: v for k, v in values.items() if min(v[0], v[1]) > TINY}
    # the logarithm of a noisy mean is low by half its relative variance
    apart = {k: math.log(w / r) + v / 2 for k, (r, w, v) in usable.items()}
    out = {k: v[0] for k, v in values.items()}
    if len(apart) < 3:  # noqa: PLR2004 - no spread to speak of
        return out
    middle = sum(apart.values()) / len(apart)
    spread = sum((d - middle) ** 2 for d in apart.values()) / (len(apart) - 1)
    noise = sum(v[2] for v in usable.values()) / len(usable)
    real = max(0.0, spread - noise)
    for layer, d in apart.items():
        trust = real / (real + usable[layer][2]) if real > 0 else 0.0
        out[layer] = usable[layer][0] * math.exp(middle + trust * (d - middle))
    return out


class _FisherListener(Listener):
    """Samples labels, makes the candidates of a block when its turn comes, and sums up."""

    def __init__(self, task: ScoreTask) -> None:
        self._task = task
        self._inputs = [Inputs() for _ in task.blocks]
        self._candidates: dict[Key, Candidate] = {}
        self._products: dict[Key, Tensor] = {}
        self._activations: dict[Key, Tensor] = {}
        self._ranges: dict[Key, Tensor] = {}
        self._felt_by: list[list[tuple[str, Tensor, Tensor]]] = [[] for _ in task.blocks]
        self._finished = 0
        self.out: dict[str, Values] = {}
        self._refs = [self._missing_in(index) for index in range(len(task.blocks))]
        self._outer = {
            name: task.model.get_submodule(name)
            for name, layer in task.layers.items()
            if layer.block is None and task.missing(name)
        }

    def _missing_in(self, index: int) -> list[WeightRef]:
        block = self._task.blocks[index]
        names = [n for n, la in self._task.layers.items() if la.block == block.name]
        return weights_of(block, [n for n in names if self._task.missing(n)])

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Differentiate by the weights outside the blocks too, as long as the context lasts."""
        for name, module in self._outer.items():
            for option, which in self._task.missing(name).items():
                self._candidates[name, option] = self._task.maker.outside(module, name, which)
            weight_of(module).requires_grad_()
        try:
            yield
            for name in self._outer:
                self._close(name)
        finally:
            for module in self._outer.values():
                weight = weight_of(module)
                weight.requires_grad = False
                weight.grad = None

    @contextlib.contextmanager
    def running(self, index: int, *, back: bool) -> Iterator[None]:
        """Gather what layers are given on the way forth; on the way back, its gradients."""
        block = self._task.blocks[index].module
        if not back:
            with self._inputs[index].gathered(block, self._refs[index]):
                yield
            return
        refs = [
            ref
            for ref in self._refs[index]
            if any(o.activation is not None for o in self._task.missing(ref.layer).values())
        ]
        with watching(block, refs, self._input_watch(index)):
            yield

    def loss(self, logits: Tensor, rows: Tensor, number: int) -> Tensor:  # noqa: ARG002
        """Return minus the log probability of labels that the model draws."""
        return drawn_loss(logits, seed=self._task.seed * 1_000_003 + number)

    def wanted(self, index: int) -> dict[str, Tensor]:
        """Make the candidates of a block, and ask for the gradients of its weights."""
        block, task = self._task.blocks[index], self._task
        open_to = {ref.layer: task.missing(ref.layer) for ref in self._refs[index]}
        inputs = self._inputs[index]
        self._candidates |= task.maker.of_block(block, open_to, inputs)
        for option in dict.fromkeys(o for named in open_to.values() for o in named):
            named = {layer: found[option] for layer, found in open_to.items() if option in found}
            ranges = ranges_of(named, inputs)
            self._ranges |= {(layer, option): value for layer, value in ranges.items()}
        return {
            ref.parameter: block.module.get_parameter(ref.parameter).detach()
            for ref in self._refs[index]
        }

    def felt(self, index: int, number: int, gradients: Mapping[str, Tensor]) -> None:
        """Let the gradients of a batch meet what the options change."""
        block = self._task.blocks[index].module
        for ref in self._refs[index]:
            if ref.parameter in gradients:
                weight = ref.view(block.get_parameter(ref.parameter).detach()).float()
                self._meet(ref.layer, number, ref.view(gradients[ref.parameter]), weight)
        self._meet_inputs(index)

    def sent(self, number: int) -> None:
        """Take the gradients of weights outside the blocks, wherever they came from."""
        for name, module in self._outer.items():
            weight = weight_of(module)
            if weight.grad is not None:
                self._meet(name, number, weight.grad, weight.detach().float())
                weight.grad = None

    def done(self, index: int) -> None:
        """Sum up a block, and let its candidates go."""
        for ref in self._refs[index]:
            self._close(ref.layer)
        self._inputs[index] = Inputs()
        self._finished += 1
        self._task.report(self._finished, len(self._task.blocks))

    def _meet(self, layer: str, number: int, gradient: Tensor, weight: Tensor) -> None:
        for option in self._task.missing(layer):
            change = self._candidates[layer, option].weight() - weight
            product = (gradient.float() * change).sum(-1).reshape(-1)
            key = (layer, option)
            if key not in self._products:
                count = len(self._task.batches)
                self._products[key] = product.new_zeros(count, len(product))
            self._products[key][number] += product

    def _close(self, layer: str) -> None:
        values: Values = {}
        for option in self._task.missing(layer):
            products = self._products.pop((layer, option), torch.zeros(1, 1)).double()
            whole = products.sum(1).square()
            moving = float(self._activations.pop((layer, option), torch.zeros(())))
            self._candidates.pop((layer, option), None)
            values[option] = (
                float(products.square().sum()),
                float(whole.sum()),
                _relative_variance(whole),
                moving,
            )
        known = self._task.known.get(layer, {})
        self.out[layer] = {**known, **values}
        self._task.save(layer, self.out[layer])

    def _input_watch(self, index: int) -> Watch:
        def watch(refs: Sequence[WeightRef], x: Tensor) -> Tensor:
            # a node of its own: siblings are given the same tensor
            mine = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()

            def feel(gradient: Tensor) -> None:
                part = gradient.detach() / len(refs)  # projections of one expert are one product
                self._felt_by[index] += [(ref.layer, x, part) for ref in refs]

            mine.register_hook(feel)
            return mine

        return watch

    def _meet_inputs(self, index: int) -> None:
        """Let the gradients of inputs meet the errors of activations.

        Layers that are given the same tensor have one error, which meets the sum of their
        gradients; each is charged its share of that, as its own gradient is large.
        """
        together: dict[int, list[tuple[str, Tensor, Tensor]]] = {}
        for layer, x, gradient in self._felt_by[index]:
            together.setdefault(id(x), []).append((layer, x, gradient.float()))
        self._felt_by[index] = []
        for group in together.values():
            first, x = group[0][0], group[0][1].detach()
            whole = torch.stack([gradient for _, _, gradient in group]).sum(0).square()
            for option, which in self._task.missing(first).items():
                if which.activation is None:
                    continue
                static = self._ranges.get((first, option))
                fake = fake_quant_activation(x, which.activation, static=static)
                error = (fake - x.float()).square()
                own = {la: (g.square() * error).sum() for la, _, g in group}
                total, shares = (whole * error).sum(), torch.stack(list(own.values())).sum()
                for layer, mine in own.items():
                    if option in self._task.missing(layer):
                        moved = total * mine / shares.clamp_min(TINY)
                        key = (layer, option)
                        self._activations[key] = self._activations.get(key, 0.0) + moved


def _relative_variance(samples: Tensor) -> float:
    """Return the variance of the samples' mean over its square."""
    count, mean = len(samples), float(samples.mean())
    if count < 2 or mean <= TINY:  # noqa: PLR2004 - chi-square of one degree, for want of better
        return 2.0 / max(1, count)
    return float(samples.var()) / count / mean**2
