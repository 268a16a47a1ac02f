"""What the solver makes of each data type."""

from __future__ import annotations

import pytest
import torch

from ar_kernels import data_type
from ar_tuner.algorithms.second_order.curvature import curvature
from ar_tuner.algorithms.second_order.grid import Grid
from ar_tuner.algorithms.second_order.solve import Problem, solve, start
from ar_tuner.algorithms.second_order.sweep import sweep

SCHEMES = ["W4A16", "W3A16", "W2A16", "MXFP4", "MXINT4", "NVFP4", "NVFP4_E5M3", "FPW8A16"]
K_TYPES = ["GGUF:Q2_K_S", "GGUF:Q3_K_S", "GGUF:Q4_K_S", "GGUF:Q6_K"]
LEGACY = ["GGUF:Q4_0", "GGUF:Q4_1", "GGUF:Q5_0", "GGUF:Q5_1"]
EVERY = [*SCHEMES, *LEGACY, *K_TYPES]


@pytest.mark.parametrize("name", EVERY)
def test_solved_is_no_worse_than_searched_and_searched_than_plain(
    name, spec_of, second_moment, weight, j
) -> None:
    gram, goal, spec = second_moment(), weight(), spec_of(name)
    kind = data_type(spec.data_type)
    (found,) = solve([Problem(goal, spec)], curvature(gram, 0.01), cycles=3)
    assert found.error <= found.searched <= found.plain
    assert found.error == pytest.approx(j(goal - found.weight.dequantize(), gram), rel=1e-3)
    plain = kind.fake_quant(goal, spec, kind.parameters(goal, spec))
    assert found.plain == pytest.approx(j(goal - plain, gram), rel=1e-3)
    assert found.error < 0.7 * found.plain


@pytest.mark.parametrize("name", EVERY)
def test_committed_parameters_hold_every_value_exactly(
    name, spec_of, second_moment, weight
) -> None:
    gram, goal, spec = second_moment(), weight(), spec_of(name)
    kind, h = data_type(spec.data_type), curvature(second_moment(), 0.01)
    params = kind.search(goal, spec, importance=gram.diagonal())
    values = sweep(goal, Grid(spec, (params,), (tuple(goal.shape),)), h)
    assert torch.equal(kind.quantize(values, spec, params).dequantize(), values)


@pytest.mark.parametrize("name", K_TYPES)
def test_committed_scales_of_super_groups_are_untouched(
    name, spec_of, second_moment, weight
) -> None:
    goal, spec = weight(), spec_of(name)
    kind, h = data_type(spec.data_type), curvature(second_moment(), 0.01)
    params = start(Problem(goal, spec), h)[0]
    committed = kind.quantize(goal, spec, params)
    (found,) = solve([Problem(goal, spec)], h, cycles=3)
    assert torch.equal(found.weight.scale, committed.scale)
    assert all(torch.equal(v, committed.extra[k]) for k, v in found.weight.extra.items())
    assert not torch.equal(found.weight.codes, committed.codes)


def test_any_data_type_is_served_through_its_fake_quant(spec_of, weight) -> None:
    class Foreign:
        """The integers, without what solvers may be given beside `DataType`."""

        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            if name in ("nearest", "params_of"):
                raise AttributeError(name)
            return getattr(self._inner, name)

    from ar_kernels.numerics import column_params, nearest

    spec = spec_of("W3A16", scale_dtype="float16")
    kind, goal = data_type("int"), weight()
    params = kind.parameters(goal, spec)
    columns = torch.tensor([5, 200])
    own = column_params(params, spec, tuple(goal.shape), columns)
    found = [nearest(goal[:, columns], spec, own, kind=k) for k in (kind, Foreign(kind))]
    assert torch.equal(*found)
