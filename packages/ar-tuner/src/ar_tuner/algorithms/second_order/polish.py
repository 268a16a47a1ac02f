"""Improve quantized weights that another algorithm has found."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ar_kernels import data_type
from ar_kernels.numerics import params_of
from ar_tuner.algorithms.second_order.algorithm import weight_spec
from ar_tuner.algorithms.second_order.curvature import curvature
from ar_tuner.algorithms.second_order.goal import group_goals
from ar_tuner.algorithms.second_order.grid import Grid
from ar_tuner.algorithms.second_order.knobs import Knobs
from ar_tuner.algorithms.second_order.sequencing import in_order
from ar_tuner.algorithms.second_order.solve import improve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_tuner.algorithms.base import BlockTask, Target
    from ar_tuner.algorithms.second_order.curvature import Curvature

POLISH = Knobs(cycles=4, pull=0.0)


def polish(
    task: BlockTask, weights: Mapping[str, QuantizedWeight], *, knobs: Knobs = POLISH
) -> dict[str, QuantizedWeight]:
    """Return the weights of a block, by layer name, none with a larger J than it had.

    Coordinate descent from the codes as they are, scales refitted where the data type has one
    level of them, towards the float weights, under the inputs that the polished layers before
    give. Weights whose parameters cannot be recovered stay as they are.
    """

    def handle(
        group: tuple[Target, ...], replaced: Mapping[str, Tensor]
    ) -> dict[str, QuantizedWeight]:
        # experts stay as they are: each has inputs of its own
        found = group_goals(task, group, replaced, knobs) if group[0].ref.whole else None
        if found is None:
            return {}
        gram, wanted = found
        cycles = task.settings.iters if knobs.cycles is None else knobs.cycles
        out = {}
        for target, goal in zip(group, wanted, strict=True):
            layer = target.ref.layer
            h = curvature(gram, knobs.damping_for(weight_spec(target).bits))
            out[layer] = polished(weights[layer], goal.weight, h, cycles=cycles)
        return out

    return in_order(task, weights, handle)


def polished(
    weight: QuantizedWeight, goal: Tensor, h: Curvature, *, cycles: int
) -> QuantizedWeight:
    """Return one weight with J no larger, in the parameters it has or refitted ones."""
    kind = data_type(weight.spec.data_type)
    params = params_of(weight, kind=kind)
    if params is None:
        return weight
    grid = Grid(weight.spec, (params,), ((goal.shape[0], goal.shape[1]),))
    values, fitted = improve(goal, weight.dequantize(), grid, h, cycles=cycles)
    made = kind.quantize(values, weight.spec, fitted[0])
    return replace(made, extra={**weight.extra, **made.extra})
