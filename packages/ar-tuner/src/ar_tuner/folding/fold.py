"""From a block to the folding that makes its layers easier to round."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ar_schemes import Span
from ar_tuner.algorithms.second_order.statistics import collect
from ar_tuner.folding.apply import Folding
from ar_tuner.folding.evening import evened, is_evened
from ar_tuner.folding.finding import few, norms_of
from ar_tuner.folding.pairs import pairs_of
from ar_tuner.folding.scales import chosen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from ar_tuner.algorithms.base import BlockTask, Target
    from ar_tuner.folding.finding import Fed
    from ar_tuner.folding.pairs import Pair

    Factor = Callable[[tuple[Target, ...], Tensor | None], Tensor | None]

OFFSETS = (0.0, 1.0)
"""What norms add to their gains."""
TRIAL = 1e-3
"""Largest square of what folding may do to a block's output, over that of the norm's share of it
alone. With gains rounded to bfloat16 it is about 1e-5; a layer that was overlooked gives 0.1."""
ROWWISE = (Span.GROUP, Span.CHANNEL)
"""Scales of a weight that are not shared by its rows: rows may then be scaled at no loss."""
ACROSS = ("nv_fp",)
"""Data types that have one scale for a whole tensor beside those."""
_POWERS = (0.5, 1.0, 2.0)


def fold(
    task: BlockTask,
    *,
    allowed: Callable[[str], bool] = lambda parameter: True,  # noqa: ARG005
    weights: bool = True,
) -> Folding:
    """Return the change of a block that makes its layers lose least by rounding.

    Scales are folded into norms, and into layers of which another is given scaled rows (`Pair`).
    `allowed` tells of a gain or bias, by name in the block, whether it may change. What does more
    than scale is left alone, with a note: the block's output has to stay as it is when channels
    are scaled at random. Layers whose activations are quantized are left alone too, unless these
    share powers of two: their ranges would change, and they have little to gain.

    Args:
        task: the block.
        allowed: whether a parameter may change.
        weights: scale for the sake of weights too, where activations are floats. It was asked for
            then, so what is left alone is told.
    """
    schemes = {t.ref.layer: t for t in task.targets}
    left = {t.ref.layer for t in task.targets if not _may(t, weights=weights)}
    plain = tuple(replace(t, scheme=replace(t.scheme, activation=None)) for t in task.targets)
    note = task.note if weights else _silent
    bare, out = replace(task, targets=plain, note=note), Folding()

    def factor(targets: tuple[Target, ...], alike: Tensor | None = None) -> Tensor | None:
        whole = [schemes[t.ref.layer] for t in targets]
        if len({t.scheme.activation for t in whole}) > 1:
            return None
        if is_evened(whole[0].scheme):
            return evened(bare, whole, alike=alike)
        return _chosen(bare, targets, alike=alike)

    norms = norms_of(bare)
    for fed in norms:
        layers = {t.ref.layer for t in fed.targets}
        if not left & layers and all(map(allowed, fed.parameters)):
            out = out.joined(_of_norm(bare, fed, factor))
    known = {*left, *(t.ref.layer for fed in norms for t in fed.targets)}
    for pair in pairs_of(bare, known=known):
        out = out.joined(_of_pair(bare, pair, allowed, factor))
    return out


def _silent(text: str) -> None:
    """Tell nobody."""


def _may(target: Target, *, weights: bool) -> bool:
    """Tell whether the input channels of a layer may be scaled."""
    return is_evened(target.scheme) or (weights and target.scheme.activation is None)


def _of_norm(task: BlockTask, fed: Fed, factor_of: Factor) -> Folding:
    """Return what is folded into a norm."""
    offset = offset_of(task, fed)
    if offset is None:
        task.note(f"{task.name}.{fed.norm} is not folded: its gain does more than scale")
        return Folding()
    factor = factor_of(fed.targets, None)
    return Folding() if factor is None else folding_of(task, fed, factor, offset)


def _of_pair(
    task: BlockTask, pair: Pair, allowed: Callable[[str], bool], factor_of: Factor
) -> Folding:
    """Return what is folded into the first layer of a pair."""
    source, name = pair.source, f"{pair.taker.ref.layer} is not folded into"
    spec, bias = source.scheme.weight, bias_of(task, source)
    if spec is None or spec.granularity.span not in ROWWISE or spec.data_type in ACROSS:
        task.note(f"{name} {source.ref.layer}: scales there are shared by its rows")
        return Folding()
    if bias is not None and not allowed(bias):
        task.note(f"{name} {source.ref.layer}: its bias is not its own")
        return Folding()
    if not proved(task, pair):
        task.note(f"{name} {source.ref.layer}: rows of that are used elsewhere too")
        return Folding()
    factor = factor_of((pair.taker,), pair.rows)
    return Folding() if factor is None else paired_folding(task, pair, factor)


def _chosen(
    task: BlockTask, targets: tuple[Target, ...], *, alike: Tensor | None = None
) -> Tensor | None:
    seen = collect(task, targets[0], {})
    if seen is None:
        return None
    weights = [task.weight(t).float() for t in targets]
    specs = [t.scheme.weight for t in targets]
    return chosen(weights, [s for s in specs if s is not None], seen.whole.gram, alike=alike)


def bias_of(task: BlockTask, target: Target) -> str | None:
    """Return the name of a layer's bias [O] in the block, or None where it has none."""
    name = f"{target.ref.module}.bias".removeprefix(".")
    return name if name in dict(task.block.named_parameters()) else None


def paired_folding(task: BlockTask, pair: Pair, factor: Tensor) -> Folding:
    """Return the folding of a factor for each input channel [I] of the second layer of a pair.

    Channels that follow one row have one factor. A bias is rounded to its own type.
    """
    rows = torch.ones(len(task.weight(pair.source)), device=factor.device)
    rows[pair.rows.to(rows.device)] = 1 / factor
    tensors, bias = {}, bias_of(task, pair.source)
    if bias is not None:
        stored = task.block.get_parameter(bias).detach()
        tensors[bias] = (stored.float() * rows).to(stored.dtype)
    layers = pair.taker.ref.layer, pair.source.ref.layer
    return Folding(tensors, {layers[0]: factor}, {layers[1]: rows})


def proved(task: BlockTask, pair: Pair) -> bool:
    """Tell whether a block gives what it gave when a pair is scaled at random."""
    powers = _random_powers(len(task.weight(pair.source)), task.weight(pair.source).device)
    trial = paired_folding(task, pair, powers[pair.rows.to(powers.device)])
    return _stays(task, trial, Folding(trial.tensors, rows=trial.rows))


def folding_of(task: BlockTask, fed: Fed, factor: Tensor, offset: float) -> Folding:
    """Return the folding of a factor for each channel [I] of what a norm gives.

    The norm multiplies by `offset` and its gain together. The factor is what the gain, rounded to
    its own type, makes of it: then only weights are rounded, which are quantized anyway.
    """
    gain = task.block.get_parameter(fed.parameters[0]).detach()
    old = gain.float() + offset
    new = (old / factor - offset).to(gain.dtype)
    left = new.float() + offset
    usable = (old != 0) & (left != 0)
    exact = torch.where(usable, old / torch.where(usable, left, 1.0), 1.0)
    tensors = {fed.parameters[0]: torch.where(usable, new, gain)}
    for name in fed.parameters[1:]:
        bias = task.block.get_parameter(name).detach()
        tensors[name] = (bias.float() / exact).to(bias.dtype)
    return Folding(tensors, {t.ref.layer: exact for t in fed.targets})


def offset_of(task: BlockTask, fed: Fed) -> float | None:
    """Return what a norm adds to its gain (0; 1 in Gemma), or None where neither is true.

    Found by trial: powers of two are folded in, which most types take without rounding, and the
    block's output has to stay.
    """
    like = task.block.get_parameter(fed.parameters[0])
    factor = _random_powers(len(like), like.device)
    for offset in OFFSETS:
        trial = folding_of(task, fed, factor, offset)
        if _stays(task, trial, Folding(trial.tensors)):
            return offset
    return None


def _random_powers(count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    powers = torch.tensor(_POWERS)
    return powers[torch.randint(len(powers), (count,), generator=generator)].to(device)


def _stays(task: BlockTask, trial: Folding, alone: Folding) -> bool:
    """Tell whether a block's output stays; how far `alone` takes it is the measure."""
    plain = _output(task, {})
    outputs = (_output(task, f.replaced(task.block, task.targets)) for f in (trial, alone))
    moved, limit = (float((x - plain).square().sum()) for x in outputs)
    return limit > 0 and moved <= TRIAL * limit


def _output(task: BlockTask, weights: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return task.run(weights, few(task))[0].float()
