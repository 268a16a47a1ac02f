"""Static ranges of activations, shrunk where clipping the largest loses less than coarse steps.

The error of a channel counts by the squares of the weights it is multiplied with: that is what it
does to the layer's output, as far as errors of different channels are independent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.activation import fake_quant_activation, static_scale
from ar_tuner.watching import watching

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_schemes import TensorSpec
    from ar_tuner.algorithms.base import BlockTask, Target
    from ar_tuner.parts import WeightRef

FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Of the largest magnitude, that are tried."""
ROWS = 32
"""Most rows that they are tried on."""


def clipped(
    task: BlockTask,
    searched: Sequence[Target],
    peaks: Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
) -> dict[str, Tensor]:
    """Return the magnitudes at which activations are best clipped, by layer that saw some.

    One more forward over some rows, and memory for the squared error of each channel under each
    factor.

    Args:
        task: the block.
        searched: the layers.
        peaks: by layer, the largest magnitude; the same in a group.
        groups: layers that have one range.
    """
    targets = {t.ref.layer: t for t in searched}
    errors = _errors(task, targets, peaks)
    out: dict[str, Tensor] = {}
    for group in groups:
        seen = [layer for layer in group if layer in errors]
        if not seen:
            continue
        total = sum(errors[n] @ _weight(task, targets[n]) for n in seen)
        assert isinstance(total, torch.Tensor)
        factor = FACTORS[int(total.argmin())]  # the largest of equals
        out |= {layer: peaks[layer] * factor for layer in seen}
    return out


def _weight(task: BlockTask, target: Target) -> Tensor:
    """Return how much the output changes by an error of each input channel, squared, [I]."""
    return task.weight(target).float().square().sum(0)


def _errors(
    task: BlockTask, targets: Mapping[str, Target], peaks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return, by layer, the squared error of each channel under each factor, summed, [F, I]."""
    sums: dict[str, Tensor] = {}
    last: tuple[Tensor, TensorSpec, Tensor, Tensor] | None = None

    def watch(refs: Sequence[WeightRef], x: Tensor) -> None:
        nonlocal last
        if not x.numel():
            return
        for ref in refs:
            spec, peak = targets[ref.layer].scheme.activation, peaks[ref.layer]
            assert spec is not None
            # siblings (q, k, v; gate, up) are given the very same, one after the other
            if last is None or last[0] is not x or last[1] != spec or last[2] is not peak:
                last = (x, spec, peak, _error(x, spec, peak))
            known = sums.get(ref.layer)
            sums[ref.layer] = last[3] if known is None else known + last[3]

    assert task.inputs is not None
    refs = [t.ref for t in targets.values()]
    with watching(task.block, refs, watch), torch.no_grad():
        for rows in task.inputs.chunks(ROWS, task.settings.batch_size):
            task.run({}, rows)
            last = None
    return sums


def _error(x: Tensor, spec: TensorSpec, peak: Tensor) -> Tensor:
    """Return the squared error of each channel of some tokens under each factor, [F, I]."""
    flat = x.detach().reshape(-1, x.shape[-1]).float()
    out = []
    for factor in FACTORS:
        made = fake_quant_activation(flat, spec, static=static_scale(peak * factor, spec))
        out.append((made - flat).square().sum(0))
    return torch.stack(out)
