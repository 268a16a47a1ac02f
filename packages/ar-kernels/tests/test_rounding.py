"""Rounding, the floor of scales and their stored precision."""

from __future__ import annotations

import torch

from ar_kernels.numerics.rounding import SMALLEST_SCALE, floored, round_ste, stored
from ar_schemes import TensorSpec


def test_halves_round_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert round_ste(x).tolist() == [-2, -2, 0, 0, 2, 2]


def test_gradient_passes_straight_through_rounding_and_storing() -> None:
    x = torch.tensor([0.3, 1.7], requires_grad=True)
    (round_ste(x) * torch.tensor([2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 3]
    x.grad = None
    stored(x, TensorSpec()).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1]


def test_stored_is_a_round_trip_through_the_scale_type() -> None:
    x = torch.tensor([0.1, 1e-9, 70000.0])
    assert torch.equal(stored(x, TensorSpec()), x.half().float())
    assert torch.equal(stored(x, TensorSpec(scale_dtype="bfloat16")), x.bfloat16().float())
    assert torch.equal(stored(x, TensorSpec(scale_dtype="float32")), x)


def test_floored_keeps_signs_and_large_values() -> None:
    x = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 0.5, -0.5])
    small = torch.tensor(SMALLEST_SCALE)
    assert torch.equal(floored(x), torch.stack([small, small, small, -small, x[4], x[5]]))
