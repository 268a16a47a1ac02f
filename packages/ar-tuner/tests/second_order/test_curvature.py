"""The matrix of second moments: silent channels, few tokens, damping, its factor."""

from __future__ import annotations

import pytest
import torch

from ar_kernels import data_type
from ar_kernels.numerics import Params
from ar_tuner import TunerError
from ar_tuner.algorithms.second_order.curvature import curvature
from ar_tuner.algorithms.second_order.solve import Problem, solve

WIDTH, HIDDEN = 64, 256


def test_silent_channels_are_rounded_to_nearest(spec_of, second_moment, weight) -> None:
    gram, goal, spec = second_moment(), weight(), spec_of("W4A16")
    gram[[3, 140], :] = 0
    gram[:, [3, 140]] = 0
    (found,) = solve([Problem(goal, spec)], curvature(gram, 0.01), cycles=2)
    near = data_type("int")
    again = near.quantize(goal, spec, Params(found.weight.scale.float()))
    assert torch.equal(found.weight.codes[:, [3, 140]], again.codes[:, [3, 140]])


def test_a_matrix_of_zeros_means_rounding_to_nearest(spec_of, weight) -> None:
    goal, spec, kind = weight(), spec_of("W4A16"), data_type("int")
    (found,) = solve([Problem(goal, spec)], curvature(torch.zeros(HIDDEN, HIDDEN), 0.01), cycles=2)
    near = kind.quantize(goal, spec, Params(found.weight.scale.float()))
    assert torch.equal(found.weight.codes, near.codes)


@pytest.mark.parametrize("name", ["W2A16", "GGUF:Q2_K_S"])
def test_fewer_tokens_than_channels_are_enough(name, correlated, spec_of, weight) -> None:
    x = correlated(1, 20, HIDDEN).reshape(-1, HIDDEN)
    gram = x.t() @ x / 20
    assert torch.linalg.matrix_rank(gram) <= 20
    (found,) = solve([Problem(weight(), spec_of(name))], curvature(gram, 0.05), cycles=3)
    assert found.error < 0.3 * found.searched
    assert torch.isfinite(found.weight.dequantize()).all()


def test_damping_grows_until_the_matrix_can_be_factorized(second_moment) -> None:
    gram = second_moment(32)
    gram -= 0.05 * gram.diagonal().mean() * torch.eye(32)  # a few negative eigenvalues
    assert torch.linalg.eigvalsh(gram).min() < 0
    assert curvature(gram, 0.01).damping > 0.01
    with pytest.raises(TunerError, match="no Cholesky factor even with"):
        curvature(torch.full((8, 8), float("nan")), 0.01)


def test_the_factor_is_that_of_the_inverse_in_falling_order(second_moment) -> None:
    gram = second_moment(48)
    h = curvature(gram, 0.01)
    energy = gram.diagonal()[h.order]
    assert (energy.diff() <= 0).all()
    damped = h.ordered + 0.01 * gram.diagonal().mean() * torch.eye(48)
    torch.testing.assert_close(
        (h.upper.t() @ h.upper).double(), torch.linalg.inv(damped.double()), rtol=1e-3, atol=1e-4
    )
