"""Algorithm `second_order`: layers solved one group after the other, without gradients.

Each layer's squared output error on the calibration rows is a quadratic form in the error of its
weight; scales are searched and committed, columns rounded in the order of their energy with each
error spread over the rest (GPTQ, arXiv 2210.17323), then descended and refitted. Layers see what
the quantized layers before them give, within the block too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ar_tuner.algorithms.base import BlockResult
from ar_tuner.algorithms.rtn import nearest, nearest_of
from ar_tuner.algorithms.second_order.curvature import curvature
from ar_tuner.algorithms.second_order.goal import goals
from ar_tuner.algorithms.second_order.knobs import Knobs
from ar_tuner.algorithms.second_order.residual import output_cross, writes_output
from ar_tuner.algorithms.second_order.sequencing import in_order
from ar_tuner.algorithms.second_order.solve import Problem, solve
from ar_tuner.algorithms.second_order.statistics import collect
from ar_tuner.algorithms.signround import block_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_schemes import TensorSpec
    from ar_tuner.algorithms.base import BlockTask, Target
    from ar_tuner.algorithms.second_order.solve import Solution


@dataclass(frozen=True)
class SecondOrder:
    """Algorithm `second_order`.

    Attributes:
        knobs: numbers of the solver.
        observe: called with the name of each solved layer and its solution.
    """

    knobs: Knobs = Knobs()
    observe: Callable[[str, Solution], None] | None = None
    name = "second_order"
    needs_inputs = True

    def quantize(self, task: BlockTask) -> BlockResult:
        """Return the solved weights of a block."""
        done = 0

        def handle(
            group: tuple[Target, ...], replaced: Mapping[str, Tensor]
        ) -> dict[str, QuantizedWeight]:
            nonlocal done
            done += len(group)
            solved = self._group(task, group, replaced)
            for layer, solution in solved.items():
                if self.observe is not None:
                    self.observe(layer, solution)
            if not solved:
                return {t.ref.layer: _unseen(task, t) for t in group}
            task.report(done, len(task.targets), sum(s.error for s in solved.values()))
            return {layer: solution.weight for layer, solution in solved.items()}

        weights = in_order(task, {}, handle)
        return BlockResult(weights, block_error(task, nearest_of(task)), block_error(task, weights))

    def _group(
        self, task: BlockTask, group: Sequence[Target], replaced: Mapping[str, Tensor]
    ) -> dict[str, Solution]:
        """Return the solutions of layers that share their input; none where nothing reaches it."""
        pulled = self.knobs.pull > 0
        alone = len(group) == 1 and pulled and writes_output(task, group[0], replaced)
        seen = collect(task, group[0], replaced, cross=pulled and not alone)
        if seen is None:
            return {}
        lack = output_cross(task, group[0], replaced) if alone else None
        cycles = self.knobs.cycles
        out: dict[str, Solution] = {}
        for damping, targets in self._by_damping(group).items():
            wanted = goals([task.weight(t) for t in targets], seen, self.knobs, lack=lack)
            problems = [
                Problem(goal, weight_spec(t), task.shared.get(t.ref.layer))
                for t, goal in zip(targets, wanted, strict=True)
            ]
            solved = solve(problems, curvature(seen.gram, damping), cycles=cycles)
            out |= {t.ref.layer: s for t, s in zip(targets, solved, strict=True)}
        return out

    def _by_damping(self, group: Sequence[Target]) -> dict[float, list[Target]]:
        out: dict[float, list[Target]] = {}
        for target in group:
            out.setdefault(self.knobs.damping_for(weight_spec(target).bits), []).append(target)
        return out


def weight_spec(target: Target) -> TensorSpec:
    """Return how the weight of a target is represented."""
    spec = target.scheme.weight
    assert spec is not None
    return spec


def _unseen(task: BlockTask, target: Target) -> QuantizedWeight:
    return nearest(target, task.weight(target), shared=task.shared.get(target.ref.layer))
