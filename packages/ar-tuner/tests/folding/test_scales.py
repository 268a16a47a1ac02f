"""Which scales are chosen."""

from __future__ import annotations

import torch

from ar_schemes import scheme
from ar_tuner.algorithms.rtn import nearest_of
from ar_tuner.algorithms.signround import block_error
from ar_tuner.folding import apply, fold
from ar_tuner.folding.scales import chosen, rounding_error


def spec_of(name: str):
    return scheme(name).with_overrides({"group_size": 32}).weight


def test_strong_channels_of_small_weights_are_scaled_up_and_rounding_loses_less() -> None:
    g = torch.Generator().manual_seed(1)
    strength = torch.ones(64)
    strength[::16] = 20.0
    x = torch.randn(512, 64, generator=g) * strength
    weight, spec = torch.randn(32, 64, generator=g) / strength, spec_of("W4A16")
    gram = x.t() @ x / len(x)
    factor = chosen([weight], [spec], gram)
    assert factor is not None
    assert factor[::16].min() > 1.5 * factor[1]
    one = torch.ones(64)
    assert rounding_error([weight], [spec], gram, factor) < 0.9 * rounding_error(
        [weight], [spec], gram, one
    )


def test_equal_channels_are_left_as_they_are() -> None:
    weight = torch.ones(32, 64) * torch.tensor([1.0, -1.0]).repeat(32)
    assert chosen([weight], [spec_of("W4A16")], torch.eye(64)) is None


def test_a_folded_block_loses_less_when_rounded(model, rows, uneven, task_of) -> None:
    task = task_of(uneven(model()), rows)
    before = block_error(task, nearest_of(task))
    folding = fold(task)
    assert folding
    apply(task.block, task.targets, folding)
    assert block_error(task, nearest_of(task)) < before
