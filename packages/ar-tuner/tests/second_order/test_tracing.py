"""What layers are given, and what becomes of what they give."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ar_kernels import equal
from ar_tuner.algorithms.base import BlockTask, Target
from ar_tuner.algorithms.rtn import Rtn
from ar_tuner.algorithms.second_order import SecondOrder
from ar_tuner.algorithms.second_order.sequencing import layer_groups
from ar_tuner.algorithms.second_order.statistics import Gap, collect
from ar_tuner.algorithms.second_order.tracing import added_share, trace
from ar_tuner.parts import WeightRef

WIDTH, HIDDEN = 64, 256


def test_layers_are_grouped_by_their_input_in_the_order_of_calls(task) -> None:
    names = [[t.ref.layer for t in group] for group in layer_groups(task())]
    assert names == [["b.q", "b.k"], ["b.o"], ["b.up"], ["b.down"]]


def test_a_layer_that_is_never_called_comes_last_and_is_rounded(task) -> None:
    made = task(layers=("up", "down"))
    made.block.spare = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(requires_grad=False)
    spare = Target(WeightRef("b.spare", "spare.weight", transposed=False), made.targets[0].scheme)
    made = dataclasses.replace(made, targets=(spare, *made.targets))
    assert [g[0].ref.layer for g in layer_groups(made)] == ["b.up", "b.down", "b.spare"]
    weights = SecondOrder().quantize(made).weights
    assert equal(weights["b.spare"], Rtn().quantize(made).weights["b.spare"])


def inputs_of(made: BlockTask) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the block's tokens in the quantized and in the float model, [T, WIDTH]."""
    return tuple(
        torch.cat([c.args[0].reshape(-1, WIDTH) for c in bank.calls])
        for bank in (made.inputs, made.float_inputs)
    )


@pytest.mark.parametrize("chunks", [1, 4, 16])
def test_moments_are_means_over_all_tokens_of_both_models(chunks, task) -> None:
    made = task(noise=0.3)
    settings = dataclasses.replace(made.settings, batch_size=16 // chunks)
    made = dataclasses.replace(made, settings=settings)
    x, x0 = inputs_of(made)
    seen = collect(made, made.targets[0], {}, gap=Gap.INPUT)
    assert seen is not None
    assert seen.whole.tokens == len(x)
    assert (seen.held is not None) == (chunks >= 8)
    torch.testing.assert_close(seen.whole.gram, x.t() @ x / len(x), rtol=1e-4, atol=1e-5)
    gap = (x0 - x).t() @ x / len(x)
    torch.testing.assert_close(seen.whole.gap, gap, rtol=1e-4, atol=1e-5)


def test_the_gap_of_outputs_is_what_the_blocks_output_lacks(task) -> None:
    made = task(noise=0.3)
    down = next(t for t in made.targets if t.ref.layer == "b.down")
    seen = collect(made, down, {}, gap=Gap.OUTPUT)
    x, _ = inputs_of(made)
    lacks = torch.stack(made.reference).reshape(-1, WIDTH) - made.block(x.unflatten(0, (-1, 16)))[
        0
    ].reshape(-1, WIDTH)
    given = torch.cat([trace(made, down, r, weights={}).given for r in made.inputs.chunks(16, 4)])
    torch.testing.assert_close(seen.whole.gap, lacks.t() @ given / len(x), rtol=1e-3, atol=1e-5)


def test_a_layer_that_adds_into_the_blocks_output_is_told_by_trial(task) -> None:
    made = task()
    shares = {t.ref.layer: added_share(made, t) for t in made.targets}
    assert shares["b.down"] == pytest.approx(1, abs=1e-4)
    assert shares["b.o"] == pytest.approx(1, abs=0.3)
    assert shares["b.q"] == shares["b.k"] == shares["b.up"] == 0


class Normed(torch.nn.Module):
    """A block whose only layer is normalized before it is added, as in Gemma 2, 3 and GLM-4."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + torch.nn.functional.rms_norm(self.down(x), (WIDTH,), eps=1e-3),)


def test_a_layer_that_is_normalized_before_it_is_added_has_no_share(task) -> None:
    made = task(layers=("down",))
    block = Normed().requires_grad_(requires_grad=False)
    block.down.weight.mul_(0.1)
    normed = dataclasses.replace(made, block=block)
    assert added_share(normed, normed.targets[0]) == 0


def test_later_layers_see_what_quantized_ones_give(task) -> None:
    made = task("W2A16")
    down = next(t for t in made.targets if t.ref.layer == "b.down")
    rough = Rtn().quantize(made).weights["b.up"].dequantize()
    rows = list(range(4))
    plain, after = (trace(made, down, rows, weights=w).given for w in ({}, {"up.weight": rough}))
    x = made.inputs.calls[0].args[0]
    x = x + made.block.o(
        torch.softmax(made.block.q(x) @ made.block.k(x).transpose(-1, -2) / WIDTH**0.5, -1) @ x
    )
    hidden = torch.nn.functional.silu(x @ rough.t())
    torch.testing.assert_close(after, hidden.reshape(-1, 2 * WIDTH))
    assert not torch.equal(plain, after)
