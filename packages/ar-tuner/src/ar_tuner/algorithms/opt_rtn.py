"""Round to nearest with searched scales: no tuning, but error weighted by what flows through.

Every group's scale (and zero point, minimum, super scale) is searched so that the squared error,
weighted by the mean square of each input channel, is least; then weights are rounded to nearest.
Inputs are those of the float model, so one forward per block is all that calibration costs.
Sources: the importance matrix of llama.cpp's quantizers and the scale search of SignRoundV2
(arXiv 2512.04746).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_kernels import data_type
from ar_tuner.algorithms.base import BlockResult
from ar_tuner.algorithms.head import search_head
from ar_tuner.algorithms.importance import input_energy
from ar_tuner.algorithms.judge import better, block_error
from ar_tuner.algorithms.rtn import nearest_of
from ar_tuner.algorithms.tunables import searched

if TYPE_CHECKING:
    from ar_kernels import QuantizedWeight
    from ar_schemes import Scheme
    from ar_tuner.algorithms.base import BlockTask

WIDE = 8
"""Integers of so many bits are so fine that a searched scale gains nothing."""


class OptRtn:
    """Algorithm `opt_rtn`."""

    name = "opt_rtn"
    needs_inputs = True
    float_inputs = True

    def quantize(self, task: BlockTask) -> BlockResult:
        """Return weights with searched scales, or the nearest where those lose less."""
        plain = nearest_of(task)
        before = block_error(task, plain)
        weights = {**plain, **searched_of(task)}
        after = block_error(task, weights)
        if better(before, after):
            return BlockResult(plain, before, before)
        return BlockResult(weights, before, after)

    def quantize_head(self, task: BlockTask) -> BlockResult:
        """Return the output head with searched scales."""
        return search_head(task)


def searched_of(task: BlockTask) -> dict[str, QuantizedWeight]:
    """Return the targets of a block with searched scales, by layer name; wide ones are left out.

    Layers that no token reached (experts) are searched with their weights' own magnitudes.
    """
    assert task.inputs is not None
    chosen = [t for t in task.targets if task.settings.search_wide or gains(t.scheme)]
    energy = task.energy or input_energy(task, rows=task.inputs.rows)
    out = {}
    for target in chosen:
        spec = target.scheme.weight
        assert spec is not None
        layer, weight = target.ref.layer, task.weight(target)
        found = searched(target, weight, energy.get(layer), shared=task.shared.get(layer))
        out[layer] = data_type(spec.data_type).quantize(weight, spec, found)
    unseen = [t.ref.layer for t in chosen if t.ref.layer not in energy]
    if unseen:
        task.note(
            f"{task.name}: no calibration token reached {len(unseen)} layers ({unseen[0]}, ...); "
            "their scales are searched by the size of their weights. More rows (nsamples) help."
        )
    return out


def gains(scheme: Scheme) -> bool:
    """Tell whether a searched scale can gain anything: not for plain integers of 8 bits.

    The same layers as in auto-round: W8A16 and INT8 (W8A8).
    """
    weight, act = scheme.weight, scheme.activation
    if weight is None:
        return False
    narrow = act is not None and act.bits < WIDE
    return weight.data_type != "int" or weight.bits < WIDE or narrow
