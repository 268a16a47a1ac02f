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
from ar_tuner.algorithms.second_order.experts import batched, expert_moments
from ar_tuner.algorithms.second_order.goal import group_goals
from ar_tuner.algorithms.second_order.knobs import Knobs
from ar_tuner.algorithms.second_order.many import solve_many
from ar_tuner.algorithms.second_order.sequencing import in_order
from ar_tuner.algorithms.second_order.solve import Problem, solve
from ar_tuner.algorithms.signround import SignRound, block_error

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

    def quantize_head(self, task: BlockTask) -> BlockResult:
        """Return the output head as SignRound tunes it: its loss is no squared error."""
        return SignRound().quantize_head(task)

    def _group(
        self, task: BlockTask, group: Sequence[Target], replaced: Mapping[str, Tensor]
    ) -> dict[str, Solution]:
        """Return the solutions of layers that share their input; none where nothing reaches it."""
        if not group[0].ref.whole:
            return self._experts(task, group, replaced)
        found = group_goals(task, group, replaced, self.knobs)
        if found is None:
            return {}
        gram, wanted = found
        by_damping: dict[float, list[tuple[Target, Problem]]] = {}
        for target, goal in zip(group, wanted, strict=True):
            spec = weight_spec(target)
            problem = Problem(goal.weight, spec, task.shared.get(target.ref.layer))
            by_damping.setdefault(self.knobs.damping_for(spec.bits), []).append((target, problem))
        cycles = self._cycles(group)
        out: dict[str, Solution] = {}
        for damping, members in by_damping.items():
            solved = solve([p for _, p in members], curvature(gram, damping), cycles=cycles)
            out |= {t.ref.layer: s for (t, _), s in zip(members, solved, strict=True)}
        return out

    def _cycles(self, group: Sequence[Target]) -> int:
        """Return the most passes of coordinate descent for layers that share their input."""
        coarse = any(
            t.scheme.activation is not None and t.scheme.activation.bits <= weight_spec(t).bits
            for t in group
        )
        return self.knobs.coarse_cycles if coarse else self.knobs.cycles

    def _experts(
        self, task: BlockTask, group: Sequence[Target], replaced: Mapping[str, Tensor]
    ) -> dict[str, Solution]:
        """Return the solutions of all experts of a parameter; none where nothing reaches any."""
        cycles = self._cycles(group)
        damping = self.knobs.damping_for(weight_spec(group[0]).bits)
        out: dict[str, Solution] = {}
        for some in batched(expert_moments(task, group, replaced)):
            problems = [
                [
                    Problem(
                        task.weight(t).float().contiguous(),
                        weight_spec(t),
                        task.shared.get(t.ref.layer),
                    )
                    for t in members
                ]
                for members, _ in some
            ]
            curvatures = [curvature(gram, damping) for _, gram in some]
            solved = solve_many(problems, curvatures, cycles=cycles)
            for (members, _), found in zip(some, solved, strict=True):
                out |= {t.ref.layer: s for t, s in zip(members, found, strict=True)}
        return out


def weight_spec(target: Target) -> TensorSpec:
    """Return how the weight of a target is represented."""
    spec = target.scheme.weight
    assert spec is not None
    return spec


def _unseen(task: BlockTask, target: Target) -> QuantizedWeight:
    return nearest(target, task.weight(target), shared=task.shared.get(target.ref.layer))
