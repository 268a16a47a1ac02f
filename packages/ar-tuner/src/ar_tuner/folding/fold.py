"""From a block to the folding that makes its layers easier to round."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_tuner.algorithms.second_order.statistics import collect
from ar_tuner.folding.apply import Folding
from ar_tuner.folding.finding import norms_of
from ar_tuner.folding.scales import chosen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from ar_tuner.algorithms.base import BlockTask
    from ar_tuner.folding.finding import Fed

OFFSETS = (0.0, 1.0)
"""What norms add to their gains."""
TRIAL = 1e-3
"""Largest square of what folding may do to a block's output, over that of the norm's share of it
alone. With gains rounded to bfloat16 it is about 1e-5; a layer that was overlooked gives 0.1."""
_POWERS = (0.5, 1.0, 2.0)


def fold(task: BlockTask, *, allowed: Callable[[str], bool] = lambda parameter: True) -> Folding:  # noqa: ARG005
    """Return the change of a block that makes its layers lose least by rounding.

    `allowed` tells of a parameter of a norm, by name in the block, whether it may change. A norm
    is left alone, with a note, where its gain cannot be taken for one: the block's output has to
    stay as it is when channels are scaled at random. Layers whose activations are quantized are
    left alone too: their ranges would change.
    """
    out = Folding()
    for fed in norms_of(task):
        specs = [t.scheme.weight for t in fed.targets]
        quantized = any(t.scheme.activation is not None for t in fed.targets)
        if quantized or not all(map(allowed, fed.parameters)):
            continue
        offset = offset_of(task, fed)
        if offset is None:
            task.note(f"{task.name}.{fed.norm} is not folded: its gain does more than scale")
            continue
        seen = collect(task, fed.targets[0], {})
        if seen is None:
            continue
        weights = [task.weight(t).float() for t in fed.targets]
        factor = chosen(weights, [s for s in specs if s is not None], seen.whole.gram)
        if factor is not None:
            out = out.joined(folding_of(task, fed, factor, offset))
    return out


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
    return Folding(tensors, {t.ref.parameter: exact for t in fed.targets})


def offset_of(task: BlockTask, fed: Fed) -> float | None:
    """Return what a norm adds to its gain (0; 1 in Gemma), or None where neither is true.

    Found by trial: powers of two are folded in, which most types take without rounding, and the
    block's output has to stay. How far it would go without the layers' share is the measure.
    """
    like = task.block.get_parameter(fed.parameters[0])
    generator = torch.Generator().manual_seed(0)
    powers = torch.tensor(_POWERS)
    factor = powers[torch.randint(len(powers), (len(like),), generator=generator)].to(like.device)
    plain = _output(task, {})
    for offset in OFFSETS:
        trial = folding_of(task, fed, factor, offset)
        both = _output(task, trial.replaced(task.block, task.targets))
        alone = _output(task, dict(trial.tensors))
        moved, limit = (float((x - plain).square().sum()) for x in (both, alone))
        if limit > 0 and moved <= TRIAL * limit:
            return offset
    return None


def _output(task: BlockTask, weights: Mapping[str, Tensor]) -> Tensor:
    assert task.inputs is not None
    rows = task.inputs.chunks(1, task.settings.batch_size)[0]
    with torch.no_grad():
        return task.run(weights, rows)[0].float()
