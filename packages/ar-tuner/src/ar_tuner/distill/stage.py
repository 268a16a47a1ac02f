"""Stage `distill`: a whole quantized model learns to predict what the float model predicts.

Blocks that were tuned one by one reproduce their own outputs; what couples them is left. Here
latent weights, scales and the gains of norms take small adaptive steps along the gradient of the
KL divergence between the two models' predictions, each row of text seen about once. Scales alone
are EfficientQAT's second phase (arXiv 2407.11062, section 3.3); moving codes as well, behind a
margin, is ours and worth several times as much (docs/log.md).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_tuner.distill.divergence import divergence
from ar_tuner.distill.frozen import FrozenLatent
from ar_tuner.distill.integers import DATA_TYPE, IntegerLatent
from ar_tuner.distill.latent import Latent
from ar_tuner.distill.moments import Moments
from ar_tuner.parts import assembled
from ar_tuner.stages import ModelResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from ar_tuner.others import Inputs
    from ar_tuner.parts import WeightRef
    from ar_tuner.stages import ModelTarget, ModelTask, Parameter

    Moving = Latent | IntegerLatent | FrozenLatent

REPORTS = 10
_PROBE = 64
"""Tokens of the two short passes (so many, and twice as many) that tell what one keeps."""
WARM = 5
"""Steps over which the step size grows to its full value."""


@dataclass(frozen=True)
class Sizes:
    """First step sizes: of latent weights in quantization steps, of scale factors, of gains."""

    codes: float
    scales: float
    gains: float


SIZES = Sizes(codes=3e-3, scales=8e-4, gains=8e-4)
"""For weights of every width: more at 2 bits gained nothing, at 50 steps twice as much lost."""


class Distill:
    """Stage `distill`."""

    name = "distill"
    may_be_flat = True

    def refine(self, task: ModelTask) -> ModelResult:
        """Return the refined weights and gains, or none where held-out rows do not gain."""
        make = FrozenLatent.of if task.settings.flat else latent_of
        latents: list[Moving] = [x for x in map(make, task.targets) if x is not None]
        part = _part(task, latents)
        before = _held_out(task, {}, part)
        gains = {name: _Gain.of(value) for name, value in task.gains.items()}
        began = _restore(task, latents, gains)
        for step in range(began, task.settings.steps):
            loss = _step(task, latents, gains, step, part=part)
            done = step + 1
            if done % max(1, task.settings.steps // REPORTS) == 0:
                task.report(done, task.settings.steps, loss)
                task.save(_state(latents, gains), done)
        made = {x.target.layer: _final(x, flat=task.settings.flat) for x in latents}
        tuned = _parameters(task, latents, made)
        moved = {name: gain.stored() for name, gain in gains.items()}
        after = _held_out(task, {**tuned, **moved}, part)
        if not after < before:
            return ModelResult(loss_before=before, loss_after=before)
        weights = {x.target.layer: x.quantize() for x in latents}
        return ModelResult(weights, moved, before, after)


def _final(latent: Moving, *, flat: bool) -> Parameter:
    like = latent.target.original
    return (lambda: latent.stored(like)) if flat else latent.stored(like)


def _parameters(
    task: ModelTask, latents: Sequence[Moving], weights: Mapping[str, Parameter]
) -> dict[str, Parameter]:
    """Return parameters of the model made of weights by layer name."""
    out: dict[str, Parameter] = {}
    apart: dict[str, list[tuple[WeightRef, Parameter]]] = {}
    for ref in (x.target.ref for x in latents):
        if ref.whole:
            out[ref.parameter] = weights[ref.layer]
        else:
            apart.setdefault(ref.parameter, []).append((ref, weights[ref.layer]))
    for name, parts in apart.items():
        later = any(callable(part) for _, part in parts)
        make = functools.partial(_joined, parts, task.stored[name])
        out[name] = make if later else make()
    return out


def _joined(parts: Sequence[tuple[WeightRef, Parameter]], stored: Tensor) -> Tensor:
    pairs = ((ref, part() if callable(part) else part) for ref, part in parts)
    (made,) = assembled(pairs, lambda _: stored).values()
    return made


def latent_of(
    target: ModelTarget, *, codes: bool = True, scales: bool = True
) -> Latent | IntegerLatent | None:
    """Return a weight that can move, or None where its data type does not say how."""
    integer = target.weight.spec.data_type == DATA_TYPE
    return (IntegerLatent if integer else Latent).of(target, codes=codes, scales=scales)


@dataclass(frozen=True)
class _Gain:
    """A float parameter that moves, in steps relative to its size; stored in its own type."""

    value: Tensor
    moments: Moments
    dtype: torch.dtype
    size: float

    @classmethod
    def of(cls, value: Tensor) -> _Gain:
        plain = value.detach().float().clone()
        size = max(float(plain.square().mean().sqrt()), 1e-3)
        return cls(plain, Moments.like(plain), value.dtype, size)

    def stored(self) -> Tensor:
        return self.value.to(self.dtype, copy=True)

    def state(self) -> dict[str, Tensor]:
        return {"value": self.value, "first": self.moments.first, "second": self.moments.second}


def _step(
    task: ModelTask,
    latents: list[Moving],
    gains: Mapping[str, _Gain],
    step: int,
    *,
    part: int,
) -> float:
    """Move everything once and return the loss of the rows it was moved for.

    The rows go through the models `part` at a time.
    """
    leaves: dict[str, Parameter] = {x.target.layer: x.leaf(x.target.original) for x in latents}
    moved = {name: gain.stored().requires_grad_() for name, gain in gains.items()}
    batch = _batch(task, step)
    total = 0.0
    for some in _parts(task.rows, task.others, batch, part):
        with torch.no_grad():
            reference = task.logits({}, some, False)  # noqa: FBT003
        with torch.enable_grad():
            replaced = {**_parameters(task, latents, leaves), **moved}
            loss = divergence(task.logits(replaced, some, True), reference)  # noqa: FBT003
            (loss * _tokens(some)).backward()  # of the sum: Adam's steps know no scale
        total += float(loss.detach()) * _count(some) / len(batch)
    share = _schedule(step, task.settings.steps)
    for latent in latents:
        leaf = leaves[latent.target.layer]
        latent.move(leaf, step, codes=SIZES.codes * share, scales=SIZES.scales * share)
    for name, gain in gains.items():
        grad = moved[name].grad
        if grad is not None:
            gain.moments.move(gain.value, grad.float(), step, SIZES.gains * share * gain.size)
    return total


def _schedule(step: int, steps: int) -> float:
    """Return the share of the full step size: a short rise, then half a cosine to zero."""
    return min(1.0, (step + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batch(task: ModelTask, step: int) -> Tensor:
    """Return the numbers of the samples of a step: all in a random order, then in another.

    The others are numbered after the rows.
    """
    count = task.rows.shape[0] + len(task.others)
    size = min(task.settings.batch_size, count)
    per_pass = count // size
    made = torch.Generator().manual_seed(task.settings.seed + step // per_pass)
    order = torch.randperm(count, generator=made)
    start = step % per_pass * size
    return order[start : start + size]


def _parts(
    rows: Tensor, others: Sequence[Inputs], numbers: Tensor, part: int
) -> Iterator[Tensor | Inputs]:
    """Yield samples by number: `part` rows at a time, of the others one."""
    plain = numbers[numbers < rows.shape[0]].to(rows.device)
    if len(plain):
        yield from rows[plain].split(part)
    yield from (others[i - rows.shape[0]] for i in numbers.tolist() if i >= rows.shape[0])


def _ids(some: Tensor | Inputs) -> Tensor:
    return some if isinstance(some, torch.Tensor) else some["input_ids"]


def _tokens(some: Tensor | Inputs) -> int:
    return _ids(some).numel()


def _count(some: Tensor | Inputs) -> int:
    return _ids(some).shape[0]


def _part(task: ModelTask, latents: list[Moving]) -> int:
    """Return how many rows fit the limits of logits and of what a pass keeps, at least one."""
    if not len(task.rows):
        return 1
    tokens = task.rows.shape[1]
    made: dict[str, Parameter] = {x.target.layer: x.leaf(x.target.original) for x in latents}
    leaves = _parameters(task, latents, made)
    long, short = (_kept(task, leaves, n) for n in (min(tokens, 2 * _PROBE), min(tokens, _PROBE)))
    per_token = (long.bytes - short.bytes) / max(1, long.tokens - short.tokens)
    per_row = max(1, int(per_token * tokens)) if long.tokens > short.tokens else long.bytes
    settings = task.settings
    size = min(settings.max_logits // (tokens * long.vocabulary), settings.max_saved // per_row)
    return max(1, min(size, settings.batch_size))


@dataclass(frozen=True)
class _Kept:
    tokens: int
    bytes: int
    vocabulary: int


def _kept(task: ModelTask, leaves: Mapping[str, Parameter], tokens: int) -> _Kept:
    """Return what a forward pass over the beginning of a row keeps for the backward pass."""
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        logits = task.logits(leaves, task.rows[:1, :tokens], True)  # noqa: FBT003
    return _Kept(tokens, sum(seen.values()), logits.shape[-1])


def _held_out(
    task: ModelTask,
    replaced: Mapping[str, Parameter],
    part: int,
) -> float:
    """Return the mean divergence of the quantized model on the held-out rows."""
    total, count = 0.0, task.held_out.shape[0] + len(task.held_others)
    with torch.no_grad():
        for some in _parts(task.held_out, task.held_others, torch.arange(count), part):
            reference = task.logits({}, some, False)  # noqa: FBT003
            found = divergence(task.logits(replaced, some, True), reference)  # noqa: FBT003
            total += float(found) * _count(some)
    return total / count


def _state(latents: list[Moving], gains: Mapping[str, _Gain]) -> dict[str, Tensor]:
    out = {f"{x.target.layer}|{k}": v for x in latents for k, v in x.state().items()}
    return out | {f"{name}|{k}": v for name, gain in gains.items() for k, v in gain.state().items()}


def _restore(task: ModelTask, latents: list[Moving], gains: Mapping[str, _Gain]) -> int:
    if task.saved is None:
        return 0
    tensors, done = task.saved
    for name, tensor in _state(latents, gains).items():
        tensor.copy_(tensors[name])
    return done
