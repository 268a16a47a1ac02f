"""The output head, tuned so that the model's next-token probabilities stay what they were.

A block is tuned against its output; the head's output are logits, of which one calibration batch
of a large vocabulary already fills gigabytes. So the reference is the float stream of hidden
states, the loss KL(float || quantized) in nats on some tokens of each minibatch, and weights are
held in slices of rows: forward slice by slice, one softmax, backward slice by slice. What is in
memory at once is bounded by `LOGITS` and `SLICE`, not by the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from ar_kernels import data_type
from ar_kernels.numerics.activation import fake_quant_activation, static_scale
from ar_tuner.activations import is_static
from ar_tuner.algorithms.base import BlockResult
from ar_tuner.algorithms.importance import Energy
from ar_tuner.algorithms.judge import JUDGED_ROWS, better
from ar_tuner.algorithms.loop import descend, generator_for
from ar_tuner.algorithms.losses import kl_divergence
from ar_tuner.algorithms.rtn import nearest
from ar_tuner.algorithms.slices import joined, slices_of
from ar_tuner.algorithms.tunables import Tunables, at_start, knobs_of, searched

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_tuner.algorithms.base import BlockTask, Target

LOGITS = 2**26
"""Logits that are computed at once: 256 MiB in float32."""


@dataclass(frozen=True)
class Head:
    """The output head of a task: float weight and bias, and its rows in slices."""

    task: BlockTask
    slices: tuple[slice, ...]

    @property
    def target(self) -> Target:
        """The head's own weight."""
        return self.task.targets[0]

    @property
    def weight(self) -> Tensor:
        """The float weight [V, H]."""
        return self.task.weight(self.target)

    @property
    def bias(self) -> Tensor | None:
        """The bias [V], if there is one."""
        found = getattr(self.task.block, "bias", None)
        return found.detach() if isinstance(found, torch.Tensor) else None

    def tokens(
        self, rows: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (quantized, float) hidden states [n, H] of tokens of some rows.

        All tokens where their logits fit, else evenly spread ones, from a drawn first one on.
        """
        assert self.task.inputs is not None
        hidden = state_of(*self.task.inputs.take(rows))
        ours = hidden.reshape(-1, hidden.shape[-1])
        theirs = torch.cat([self.task.reference[r].reshape(-1, ours.shape[-1]) for r in rows])
        step = -(-ours.shape[0] * self.weight.shape[0] // LOGITS)
        first = 0
        if generator is not None and step > 1:
            first = int(torch.randint(step, (1,), generator=generator))
        return self._activated(ours[first::step]), theirs[first::step]

    def logits(self, hidden: Tensor, parts: Sequence[Tensor] | None = None) -> Tensor:
        """Return float32 logits [n, V] for hidden states, with weights in slices or the float."""
        parts = [self.weight[s] for s in self.slices] if parts is None else parts
        out = torch.cat([linear(hidden, p.to(hidden.dtype)) for p in parts], -1).float()
        bias = self.bias
        return self.task.tail(out if bias is None else out + bias.float())

    def _activated(self, hidden: Tensor) -> Tensor:
        spec = self.target.scheme.activation
        if spec is None:
            return hidden
        static = self.task.ranges.get(self.target.ref.layer)
        return fake_quant_activation(hidden, spec, static=static).to(hidden.dtype)


class HeadObjective:
    """KL of the float model's next-token probabilities from those of the quantized head."""

    def __init__(self, head: Head, tunables: Sequence[Tunables]) -> None:
        self._head = head
        self._tunables = tunables
        self._generator = generator_for(head.task.settings, f"{head.task.name} tokens")

    def backward(self, rows: Sequence[int], share: float) -> Tensor:
        """Return the loss on some rows; add `share` times its gradient to the tunables'."""
        head = self._head
        ours, theirs = head.tokens(rows, self._generator)
        with torch.no_grad():
            reference = head.logits(theirs)
            parts = [t.fake_quant().to(ours.dtype) for t in self._tunables]
            raw = torch.cat([linear(ours, p) for p in parts], -1).float()
        with torch.enable_grad():
            raw.requires_grad_()
            bias = head.bias
            loss = kl_divergence(
                head.task.tail(raw if bias is None else raw + bias.float()), reference
            )
            (loss * (1000.0 * share)).backward()
            assert raw.grad is not None
            del parts, reference
            for part, rows_of_part in zip(self._tunables, head.slices, strict=True):
                part.fake_quant().backward(raw.grad[:, rows_of_part].t() @ ours.float())
        return loss.detach()

    def error(self, rows: Sequence[int]) -> float:
        """Return the loss on some rows, without gradients."""
        with torch.no_grad():
            return head_error(self._head, [t.fake_quant() for t in self._tunables], rows)


def tune_head(task: BlockTask) -> BlockResult:
    """Return the tuned weight of the output head, or the nearest if that loses less.

    `task.block` is the head, `task.inputs` the hidden states that the quantized blocks give it and
    `task.reference` those of the float model, by row. Losses are KL divergences in nats.
    """
    head = Head(task, slices_of(task.weight(task.targets[0]).shape, task.targets[0]))
    shared = head_shared(head)
    plain = _per_slice(head, lambda t, w: nearest(t, w, shared=shared))
    before = judged(head, plain)
    if task.settings.iters == 0:
        return _result(head, plain, before, before)
    energy = head_energy(head) if task.settings.scale_init == "search" else None
    tunables = [
        at_start(head.target, head.weight[s], task.settings, energy=energy, shared=shared)
        for s in head.slices
    ]
    descend(HeadObjective(head, tunables), knobs_of(tunables, task.settings), task)
    if not all(t.is_finite() for t in tunables):
        return _result(head, plain, before, before, diverged=True)
    tuned = [t.quantize() for t in tunables]
    after = judged(head, tuned)
    if better(before, after):
        return _result(head, plain, before, before, diverged=not math.isfinite(after))
    return _result(head, tuned, before, after)


def search_head(task: BlockTask) -> BlockResult:
    """Return the head with searched scales, or rounded to nearest if that loses less."""
    head = Head(task, slices_of(task.weight(task.targets[0]).shape, task.targets[0]))
    shared, energy = head_shared(head), head_energy(head)
    plain = _per_slice(head, lambda t, w: nearest(t, w, shared=shared))
    spec = head.target.scheme.weight
    assert spec is not None
    kind = data_type(spec.data_type)
    found = _per_slice(
        head, lambda t, w: kind.quantize(w, spec, searched(t, w, energy, shared=shared))
    )
    before, after = judged(head, plain), judged(head, found)
    if better(before, after):
        return _result(head, plain, before, before)
    return _result(head, found, before, after)


def judged(head: Head, parts: Sequence[QuantizedWeight]) -> float:
    """Return the KL divergence of a head in slices on the rows that blocks are judged on."""
    task = head.task
    assert task.inputs is not None
    weights = [p.dequantize(head.weight.dtype) for p in parts]
    total, count = 0.0, 0
    for rows in task.inputs.chunks(JUDGED_ROWS, task.settings.batch_size):
        total += head_error(head, weights, rows) * len(rows)
        count += len(rows)
    return total / count


def head_error(head: Head, weights: Sequence[Tensor], rows: Sequence[int]) -> float:
    """Return the KL divergence on some rows, as many tokens of them as `LOGITS` allows."""
    with torch.no_grad():
        ours, theirs = head.tokens(rows)
        return float(kl_divergence(head.logits(ours, weights), head.logits(theirs)))


def head_ranges(task: BlockTask) -> dict[str, Tensor]:
    """Return the range of the head's activations by layer name; empty if they have no fixed one."""
    target = task.targets[0]
    if not is_static(target.scheme) or task.inputs is None:
        return {}
    assert target.scheme.activation is not None
    peaks = []
    for rows in task.inputs.chunks(task.inputs.rows, task.settings.batch_size):
        hidden = state_of(*task.inputs.take(rows))
        peaks.append(hidden.detach().float().abs().amax())
    scale = static_scale(torch.stack(peaks).amax(), target.scheme.activation)
    return {target.ref.layer: scale.reshape(1)}


def state_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states in the arguments of a call of the head."""
    state: Tensor = args[0] if args else next(iter(kwargs.values()))
    return state


def head_energy(head: Head) -> Tensor:
    """Return the mean square of each channel of the float hidden states, [H]."""
    energy = Energy()
    for row in head.task.reference:
        energy.add(["head"], row)
    return energy.means()["head"]


def head_shared(head: Head) -> dict[str, Tensor]:
    """Return the parameters that the slices of the head have in common."""
    spec = head.target.scheme.weight
    assert spec is not None
    return data_type(spec.data_type).shared([head.weight], spec)


def _per_slice(
    head: Head, quantize: Callable[[Target, Tensor], QuantizedWeight]
) -> list[QuantizedWeight]:
    return [quantize(head.target, head.weight[s]) for s in head.slices]


def _result(
    head: Head,
    parts: Sequence[QuantizedWeight],
    before: float,
    after: float,
    *,
    diverged: bool = False,
) -> BlockResult:
    layer = head.target.ref.layer
    weights = {layer: joined(parts, layer)}
    return BlockResult(weights, before, after, diverged=diverged)
