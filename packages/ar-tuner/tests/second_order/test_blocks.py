"""The algorithm on whole blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ar_kernels import equal
from ar_tuner.algorithms.rtn import Rtn
from ar_tuner.algorithms.second_order import SecondOrder, polish, starting_params
from ar_tuner.algorithms.second_order.curvature import curvature
from ar_tuner.algorithms.second_order.solve import Problem, start
from ar_tuner.algorithms.second_order.statistics import collect
from ar_tuner.registry import algorithm


@pytest.mark.parametrize("name", ["W4A16", "W2A16", "MXFP4", "NVFP4"])
def test_the_blocks_error_falls(name, task) -> None:
    made = task(name, noise=0.02)
    result = SecondOrder().quantize(made)
    assert result.loss_after < 0.8 * result.loss_before
    assert set(result.weights) == {t.ref.layer for t in made.targets}


def test_equal_tasks_give_equal_bits_and_nothing_is_left_behind(task) -> None:
    made = task(noise=0.1)
    before = {k: v.clone() for k, v in made.block.state_dict().items()}
    state = torch.get_rng_state()
    one, two = (SecondOrder().quantize(made).weights for _ in range(2))
    assert all(equal(one[n], two[n]) for n in one)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in made.block.state_dict().items())
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in made.block.modules()]
    assert not any(h or p for h, p in hooks)


def test_progress_counts_layers_and_every_solution_can_be_observed(task) -> None:
    steps, seen = [], {}
    made = dataclasses.replace(task(), report=lambda *a: steps.append(a))
    SecondOrder(observe=lambda layer, s: seen.setdefault(layer, s)).quantize(made)
    assert [s[:2] for s in steps] == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert set(seen) == {t.ref.layer for t in made.targets}
    assert all(s.error <= s.searched <= s.plain for s in seen.values())


@pytest.mark.parametrize("name", ["W3A16", "NVFP4"])
def test_polish_lowers_the_error_of_any_weights(name, task, j) -> None:
    made = task(name)
    rough = Rtn().quantize(made).weights
    better = polish(made, rough)
    for target in made.targets[:2]:  # q and k: the same inputs before and after
        gram = collect(made, target, {}).whole.gram
        own = made.weight(target)
        layer = target.ref.layer
        assert j(own - better[layer].dequantize(), gram) < 0.8 * j(
            own - rough[layer].dequantize(), gram
        )


def test_starting_parameters_are_searched_with_the_inputs_energy(task) -> None:
    made = task("W2A16")
    found = starting_params(made)
    q = made.targets[0]
    gram = collect(made, q, {}).whole.gram
    wanted = start(Problem(made.weight(q), q.scheme.weight), curvature(gram, 0.05))[0]
    assert torch.equal(found["b.q"].scale, wanted.scale)
    assert set(found) == {t.ref.layer for t in made.targets}


def test_it_is_found_by_name() -> None:
    assert isinstance(algorithm("second_order"), SecondOrder)
