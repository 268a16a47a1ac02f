"""Optimizers, schedules, losses and selection, each against its definition."""

from __future__ import annotations

import pytest
import torch

from ar_tuner import TunerError
from ar_tuner.algorithms.base import TuneSettings
from ar_tuner.algorithms.losses import SHARE, kl_divergence, mse, suppressed_mse
from ar_tuner.algorithms.optimizers import SCHEDULES, Adam, Knob, SignDescent, make_optimizer
from ar_tuner.algorithms.selection import LOOKS, Best, Last, Validated, make_selection
from ar_tuner.rows import RowBank
from ar_tuner.walk import Call


def knob(*values: float, size: float = 0.1, upper: float | None = None) -> Knob:
    return Knob(torch.tensor(values).requires_grad_(), size, upper)


def push(one: Knob, *grad: float) -> None:
    one.value.grad = torch.tensor(grad)


def test_a_signed_step_has_the_size_of_the_schedule_whatever_the_gradient() -> None:
    one = knob(0.0, 0.0, 0.0)
    push(one, 1e-9, -50.0, 0.0)
    SignDescent([one]).step(0.5)
    torch.testing.assert_close(one.value.detach(), torch.tensor([-0.05, 0.05, 0.0]))
    assert one.value.grad is None


def test_momentum_remembers_earlier_gradients() -> None:
    one = knob(0.0)
    optimizer = SignDescent([one], momentum=0.9)
    push(one, 1.0)
    optimizer.step(1.0)
    push(one, -0.5)  # 0.9 * 1 - 0.5 is still positive
    optimizer.step(1.0)
    torch.testing.assert_close(one.value.detach(), torch.tensor([-0.2]))


def test_a_step_stops_at_the_end_of_a_range_and_knobs_without_gradient_stay() -> None:
    one, still = knob(0.05, 1.95, upper=2.0), knob(1.0)
    push(one, 1.0, -1.0)
    SignDescent([one, still]).step(1.0)
    assert one.value.tolist() == [0.0, 2.0]
    assert still.value.item() == 1.0


def test_adam_is_that_of_pytorch_with_the_step_of_the_schedule() -> None:
    ours, theirs = knob(0.3, -0.7), torch.tensor([0.3, -0.7]).requires_grad_()
    mine = make_optimizer(TuneSettings(optimizer="adam"), [ours])
    assert isinstance(mine, Adam)
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)
    for step in range(5):
        for value in (ours.value, theirs):
            value.grad = (value.detach() - 1.0) ** 3
        reference.param_groups[0]["lr"] = 0.1 * SCHEDULES["cosine"](step / 5)
        reference.step()
        mine.step(SCHEDULES["cosine"](step / 5))
    assert torch.equal(ours.value, theirs)
    assert ours.value.grad is None
    bounded = knob(0.0, size=1.0, upper=2.0)
    push(bounded, 1.0)
    Adam([bounded]).step(1.0)
    assert bounded.value.item() == 0.0


def test_schedules_begin_at_the_whole_step_and_fall_as_their_names_say() -> None:
    assert {name: left(0.0) for name, left in SCHEDULES.items()} == dict.fromkeys(SCHEDULES, 1.0)
    assert SCHEDULES["linear"](0.25) == 0.75
    assert SCHEDULES["cosine"](0.5) == pytest.approx(0.5)
    assert SCHEDULES["cosine"](0.25) > SCHEDULES["linear"](0.25)
    assert SCHEDULES["constant"](0.99) == 1.0


@pytest.mark.parametrize("count", [1, 5, 999, 1000, 4000])
def test_the_largest_errors_are_left_out_of_the_suppressed_loss(count) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    zeros = torch.zeros(count)
    slow = sorted(float(v) ** 2 for v in values)
    dropped = max(1, count // SHARE) if count > 1 else 0
    expected = sum(slow[: count - dropped]) / count
    assert float(suppressed_mse(values, zeros)) == pytest.approx(expected, rel=1e-5)
    assert float(mse(values, zeros)) == pytest.approx(sum(slow) / count, rel=1e-5)


def test_equal_errors_are_no_outliers_and_outliers_have_no_gradient() -> None:
    ones = torch.ones(50)
    assert float(suppressed_mse(ones, torch.zeros(50))) == 1.0
    output = torch.tensor([[1.0, 100.0, -2.0]]).requires_grad_()
    suppressed_mse(output, torch.zeros(1, 3)).backward()
    torch.testing.assert_close(output.grad, torch.tensor([[2.0, 0.0, -4.0]]) / 3)


def test_kl_divergence_is_that_of_the_probabilities() -> None:
    ours, theirs = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0)).unbind(0)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(kl_divergence(ours, theirs), expected)
    assert float(kl_divergence(theirs, theirs)) == 0.0


def test_the_best_iterate_is_that_of_the_least_minibatch_loss() -> None:
    one = knob(0.0)
    best = Best([one])
    for step, loss in enumerate((3.0, 1.0, 2.0)):
        assert not best.offer(step, torch.tensor(loss))
        one.value.data += 1.0
    best.settle()
    assert one.value.item() == 1.0


def test_a_loop_without_progress_stops_after_the_gap() -> None:
    best = Best([knob(0.0)], patience=3)
    losses = (5.0, 4.0, 4.5, 4.5, 4.5)
    assert [best.offer(i, torch.tensor(v)) for i, v in enumerate(losses)] == [False] * 4 + [True]


def test_nothing_is_chosen_where_no_loss_is_a_number() -> None:
    one = knob(7.0)
    best = Best([one])
    best.offer(0, torch.tensor(float("nan")))
    best.settle()
    assert one.value.item() == 7.0


def test_validation_looks_at_the_iterates_and_the_last_not_at_minibatches() -> None:
    one = knob(0.0)
    seen = []

    def judge() -> float:
        seen.append(one.value.item())
        return abs(one.value.item() - 41.0)

    chosen = Validated([one], judge, steps=40)
    for step in range(40):
        chosen.offer(step, torch.tensor(float(step)))
        one.value.data += 1.0
    chosen.settle()
    assert seen == [float(i) for i in range(0, 41, 40 // LOOKS)]
    assert one.value.item() == 40.0


def test_validation_stops_after_the_gap_too() -> None:
    chosen = Validated([knob(0.0)], lambda: 1.0, steps=20, patience=4)
    assert [chosen.offer(i, torch.tensor(0.0)) for i in range(5)] == [False] * 4 + [True]


def test_settings_say_which_iterate_is_chosen() -> None:
    def kind(**settings) -> type:
        return type(make_selection(TuneSettings(**settings), [], lambda: 0.0))

    assert kind() is Last
    assert kind(keep="best") is Best
    assert kind(keep="best", validation_rows=2) is Validated


def bank(*shapes: tuple[int, int]) -> RowBank:
    calls = [Call(0, (torch.ones(*shape),), {}) for shape in shapes]
    return RowBank.of(calls, [shape[0] for shape in shapes])


def test_rows_held_out_are_never_drawn() -> None:
    made = bank((4, 3), (4, 3))
    held = made.held_out(3, 2)
    assert held == [[5, 6], [7]]
    without = frozenset(row for rows in held for row in rows)
    draw = made.minibatches(2, torch.Generator().manual_seed(0), without=without)
    assert {row for _ in range(8) for row in draw()} == {0, 1, 2, 3, 4}


def test_calls_that_cannot_be_joined_are_held_out_whole() -> None:
    made = bank((2, 3), (2, 5), (2, 7))
    assert made.held_out(1, 8) == [[4, 5]]
    assert made.held_out(3, 8) == [[2, 3], [4, 5]]
    draw = made.minibatches(2, torch.Generator().manual_seed(0), without=frozenset({4, 5}))
    assert sorted(sorted(rows) for rows in [draw(), draw()]) == [[0, 1], [2, 3]]
    assert made.held_out(0, 8) == []


@pytest.mark.parametrize("made", [bank((4, 3)), bank((2, 3), (2, 5))], ids=["joined", "apart"])
def test_holding_out_everything_is_refused(made) -> None:
    with pytest.raises(TunerError, match="validation_rows 4 leaves none of the 4 calibration"):
        made.held_out(4, 2)
