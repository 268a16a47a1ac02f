from __future__ import annotations

import pytest
import torch
from torch import nn

from ar_tuner import TunerError
from ar_tuner.adapters import GenericAdapter
from ar_tuner.blocks import find_blocks
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call, execute, hidden, suspended, trace_calls, without_cache

ADAPTER = GenericAdapter()
KINDS = ("llama", "qwen3", "gemma2", "gpt2")


def logits_by_walk(made, rows):
    """Drive a model block by block through suspended frames."""
    blocks = [b.module for b in find_blocks(made, ADAPTER).blocks]
    entry = ADAPTER.entry(made)
    with suspended(entry, blocks, [ADAPTER.inputs(made, rows)]) as frames:
        seen = []
        while frames[0].call is not None:
            call = frames[0].call
            seen.append(call)
            frames[0].resume(execute(blocks[call.index], call))
        return frames[0].output.logits, seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_suspended_forward_computes_what_the_model_does(model, rows, kind) -> None:
    made = model(kind)
    walked, _ = logits_by_walk(made, rows)
    with torch.no_grad():
        assert torch.equal(walked, made(input_ids=rows, use_cache=False).logits)


def test_masks_stay_boolean_and_no_cache_is_passed(model, rows) -> None:
    made = model("mistral")  # sliding window: its mask cannot be left out
    made.set_attn_implementation("sdpa")
    _, calls = logits_by_walk(made.to(torch.bfloat16), rows)
    masks = [
        c.kwargs["attention_mask"] for c in calls if c.kwargs.get("attention_mask") is not None
    ]
    assert masks
    assert all(m.dtype is torch.bool for m in masks)
    assert all(c.kwargs.get("past_key_values") is None for c in calls)


def test_the_order_of_calls_is_traced(model, rows) -> None:
    made = model("llama")
    blocks = [b.module for b in find_blocks(made, ADAPTER).blocks]
    assert trace_calls(made, blocks, ADAPTER.inputs(made, rows[:1])) == [0, 1]


def test_blocks_have_their_own_forward_again(model, rows) -> None:
    made = model("llama")
    blocks = [b.module for b in find_blocks(made, ADAPTER).blocks]
    with suspended(made, blocks, [ADAPTER.inputs(made, rows)] * 2):
        assert "forward" in blocks[0].__dict__
    assert "forward" not in blocks[0].__dict__


def test_an_error_of_the_model_reaches_the_caller(rows) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, input_ids):
            self.block(input_ids)
            raise ValueError("of the model")

    made = Broken()
    with (
        pytest.raises(ValueError, match="of the model"),
        suspended(made, [made.block], [{"input_ids": rows}]) as frames,
    ):
        frames[0].resume(rows)


def test_a_block_that_returns_no_tensor_is_refused() -> None:
    assert hidden((torch.ones(1), 3)).shape == (1,)
    with pytest.raises(TunerError, match="a block returned dict"):
        hidden({"x": 1})


def call(value, mask=None):
    return Call(0, (value,), {"mask": mask, "pair": (torch.zeros(2), "text")})


def test_any_rows_of_any_calls_make_a_minibatch() -> None:
    values = [torch.arange(6.0).view(3, 2), 10 + torch.arange(4.0).view(2, 2)]
    bank = RowBank.of([call(v) for v in values], [3, 2])
    assert bank.rows == 5
    args, kwargs = bank.take([4, 0])
    assert args[0].tolist() == [[12.0, 13.0], [0.0, 1.0]]
    assert kwargs["pair"][1] == "text"
    whole, _ = bank.take([0, 1, 2])
    assert torch.equal(whole[0], values[0])


def test_calls_of_different_shapes_are_drawn_apart() -> None:
    bank = RowBank.of([call(torch.ones(2, 3)), call(torch.ones(2, 5))], [2, 2])
    assert not bank.joinable
    assert bank.chunks(3, 8) == [[0, 1], [2, 3]]
    draw = bank.minibatches(8, torch.Generator().manual_seed(0))
    assert sorted(sorted(rows) for rows in [draw(), draw()]) == [[0, 1], [2, 3]]
    draw = bank.minibatches(1, torch.Generator().manual_seed(0))
    assert sorted(draw() for _ in range(4)) == [[0], [1], [2], [3]]
    args, _ = bank.take([2, 3])
    assert args[0].shape == (2, 5)


def test_calls_of_equal_shapes_make_groups_among_others() -> None:
    values = [torch.full((2, 3), 1.0), torch.full((1, 5), 2.0), torch.full((2, 3), 3.0)]
    bank = RowBank.of([call(v) for v in values], [2, 1, 2])
    assert [group.calls for group in bank.groups] == [(0, 2), (1,)]
    assert bank.chunks(5, 3) == [[0, 1, 3], [2], [4]]
    assert bank.chunks(2, 3) == [[0, 1, 3]]
    assert bank.held_out(1, 3) == [[4]]
    args, _ = bank.take([4, 0])
    assert args[0][:, 0].tolist() == [3.0, 1.0]
    draw = bank.minibatches(2, torch.Generator().manual_seed(0), without=frozenset([4]))
    epoch = [draw() for _ in range(3)]
    assert sorted(sum(epoch, [])) == [0, 1, 2, 3]
    assert all(len({bank.take([r])[0][0].shape for r in rows}) == 1 for rows in epoch)


def test_calls_that_share_different_states_are_drawn_whole() -> None:
    shared = [torch.zeros(5), torch.ones(5)]
    calls = [Call(0, (torch.ones(2, 3),), {"state": state}) for state in shared]
    bank = RowBank.of(calls, [2, 2])
    draw = bank.minibatches(1, torch.Generator().manual_seed(0))
    assert sorted([draw(), draw()]) == [[0, 1], [2, 3]]


def test_positions_in_time_height_and_width_are_taken_along_their_second_axis() -> None:
    tables = torch.arange(3 * 8 * 4.0).view(3, 8, 4)
    states = torch.arange(8.0).view(8, 1)
    calls = [Call(0, (states[i : i + 4],), {"rope": (tables[:, i : i + 4],)}) for i in (0, 4)]
    args, kwargs = RowBank.of(calls, [4, 4]).take([6, 1])
    assert args[0].flatten().tolist() == [6.0, 1.0]
    assert torch.equal(kwargs["rope"][0], tables[:, [6, 1]])


def test_a_call_with_several_entries_per_row_is_drawn_whole() -> None:
    features = torch.arange(8.0).view(8, 1, 1)  # two rows of four tiles
    bank = RowBank.of([Call(0, (torch.ones(2, 3),), {"seen": features})], [2])
    draw = bank.minibatches(2, torch.Generator().manual_seed(0))
    assert all(draw() == [0, 1] for _ in range(4))
    assert bank.chunks(1, 1) == [[0, 1]]


def test_a_row_may_be_an_output_of_any_shape() -> None:
    calls = [Call(0, (torch.ones(n, 4),), {"ends": torch.tensor([0, n])}) for n in (6, 9, 6)]
    bank = RowBank.of(calls, [1, 1, 1])
    assert bank.chunks(3, 8) == [[0], [1], [2]]
    assert bank.take([1])[0][0].shape == (9, 4)


def test_minibatches_are_an_epoch_without_repetition_and_depend_on_the_seed() -> None:
    bank = RowBank.of([call(torch.ones(8, 3))], [8])

    def epoch(seed):
        draw = bank.minibatches(4, torch.Generator().manual_seed(seed))
        return [draw(), draw()]

    assert sorted(sum(epoch(0), [])) == list(range(8))
    assert epoch(0) == epoch(0) != epoch(1)


def test_a_row_beyond_the_end_is_an_error() -> None:
    bank = RowBank.of([call(torch.ones(2, 3))], [2])
    with pytest.raises(IndexError):
        bank.take([2])


def test_outputs_split_into_rows() -> None:
    found = rows_of([torch.ones(2, 3), torch.zeros(1, 3)])
    assert [r.sum().item() for r in found] == [3.0, 3.0, 0.0]


def test_caches_are_left_out_whatever_they_are_called() -> None:
    cache = pytest.importorskip("transformers").DynamicCache()
    given = {"cache": cache, "past_key_values": cache, "use_cache": True, "x": 1}
    assert without_cache(given) == {
        "cache": None,
        "past_key_values": None,
        "use_cache": False,
        "x": 1,
    }
