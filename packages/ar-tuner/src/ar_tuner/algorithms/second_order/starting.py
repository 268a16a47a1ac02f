"""Scales to start another algorithm from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_tuner.algorithms.second_order.algorithm import weight_spec
from ar_tuner.algorithms.second_order.curvature import curvature
from ar_tuner.algorithms.second_order.knobs import Knobs
from ar_tuner.algorithms.second_order.sequencing import layer_groups
from ar_tuner.algorithms.second_order.solve import Problem, start
from ar_tuner.algorithms.second_order.statistics import collect

if TYPE_CHECKING:
    from ar_kernels.numerics import Params
    from ar_tuner.algorithms.base import BlockTask


def starting_params(task: BlockTask, *, knobs: Knobs | None = None) -> dict[str, Params]:
    """Return parameters for each layer of a block that tokens reach, by layer name.

    Those of `search` weighted by the energy of the inputs, or plain ones where rounding to
    nearest with them has the smaller output error.
    """
    knobs = Knobs() if knobs is None else knobs
    out = {}
    for group in layer_groups(task):
        seen = collect(task, group[0], {}) if group[0].ref.whole else None
        if seen is None:
            continue
        for target in group:
            spec, layer = weight_spec(target), target.ref.layer
            weight = task.weight(target).float().contiguous()
            h = curvature(seen.whole.gram, knobs.damping_for(spec.bits))
            out[layer] = start(Problem(weight, spec, task.shared.get(layer)), h)[0]
    return out
