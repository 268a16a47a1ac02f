"""Several consecutive blocks tuned as one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ar_kernels import equal
from ar_tuner import AutoRound, TunerError, events
from ar_tuner.adapters import GenericAdapter
from ar_tuner.blocks import find_blocks
from ar_tuner.rows import RowBank
from ar_tuner.walk import hidden, suspended
from ar_tuner.window import Window, check_chained, follow, joint_call, windows

ADAPTER = GenericAdapter()
QUICK = {"iters": 3, "nsamples": 8, "seqlen": 32, "batch_size": 4, "group_size": 32}


def test_windows_join_neighbours_of_one_list() -> None:
    lists = ["a", "a", "a", "b", "b"]
    assert windows(range(5), lists, 2) == [(0, 1), (2,), (3, 4)]
    assert windows(range(5), lists, 9) == [(0, 1, 2), (3, 4)]
    assert windows(range(5), lists, 1) == [(i,) for i in range(5)]


def test_blocks_that_are_called_twice_or_out_of_order_are_tuned_alone() -> None:
    assert windows([0, 1, 0, 1], ["a"] * 2, 2) == [(0,), (1,), (0,), (1,)]
    assert windows([1, 0, 2], ["a"] * 3, 3) == [(1,), (0,), (2,)]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mistral", "qwen3"])
def test_a_window_computes_what_its_blocks_do_in_the_model(model, rows, kind) -> None:
    made = model(kind)
    modules = [b.module for b in find_blocks(made, ADAPTER).blocks]
    batches = [ADAPTER.inputs(made, part) for part in rows.split(4)]
    check_chained(made, modules, [(0, 1)], ADAPTER.inputs(made, rows[:1]))
    with suspended(made, modules, batches) as frames:
        firsts = [f.call for f in frames]
        passages = [follow(modules, (0, 1), frame) for frame in frames]
    with torch.no_grad():
        expected = modules[1](
            hidden(modules[0](*firsts[0].args, **firsts[0].kwargs)), **passages[0].calls[1].kwargs
        )
        window = Window(modules, passages[0].places)
        calls = [joint_call(p, first) for p, first in zip(passages, firsts, strict=True)]
        bank = RowBank.of(calls, [4, 4])
        args, kwargs = bank.take([1, 6])
        out = hidden(window(*args, **kwargs))
    assert torch.equal(hidden(passages[0].output), hidden(expected))
    torch.testing.assert_close(out[0], hidden(passages[0].output)[1])
    torch.testing.assert_close(out[1], hidden(passages[1].output)[2])


class Between(nn.Module):
    """Computes between its blocks, or hands a second state on."""

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair() for _ in range(2))
        self.scaled = scaled

    def forward(self, input_ids):
        state, other = input_ids.float(), torch.ones(1)
        for layer in self.layers:
            out = layer(state, other)
            state, other = (out * 2 if self.scaled else out), other + out.mean()
        return state


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, state, other):
        return self.linear(state) + other


@pytest.mark.parametrize("scaled", [True, False], ids=["computes-between", "second-state"])
def test_blocks_that_are_not_chained_are_refused_before_work(scaled) -> None:
    made = Between(scaled=scaled)
    rows = {"input_ids": torch.ones(1, 4)}
    check_chained(made, list(made.layers), [(0,), (1,)], rows)
    with pytest.raises(TunerError, match="nblocks above 1 cannot be used with this model: block 1"):
        check_chained(made, list(made.layers), [(0, 1)], rows)


def test_a_frame_that_leaves_the_window_is_refused() -> None:
    made = Between(scaled=False)
    with (
        suspended(made, list(made.layers), [{"input_ids": torch.ones(1, 4)}]) as (frame,),
        pytest.raises(TunerError, match="nblocks above 1"),
    ):
        follow(list(made.layers), (0, 0), frame)


def test_every_layer_of_a_window_is_tuned_and_reported(model, rows) -> None:
    seen: list[events.Event] = []
    numbers = {**QUICK, "iters": 30}
    made = model("llama", num_hidden_layers=3)
    _, plan = AutoRound(
        made, scheme="W3A16", dataset=rows, nblocks=2, on_event=seen.append, **numbers
    ).quantize()
    done = [e for e in seen if isinstance(e, events.BlockDone)]
    assert [e.index for e in done] == [0, 1, 2]
    assert done[0].loss_after == done[1].loss_after < done[0].loss_before
    assert len(plan.quantized) == 21


def test_static_ranges_and_both_chains_work_with_windows(model, rows) -> None:
    for chain in (True, False):
        made = model("llama", hidden_size=64)
        job = AutoRound(
            made, scheme="FP8_STATIC", dataset=rows, nblocks=2, enable_quanted_input=chain,
            **{k: v for k, v in QUICK.items() if k != "group_size"},
        )  # fmt: skip
        job.quantize()
        assert torch.isfinite(made(input_ids=rows).logits).all()


def test_a_killed_window_is_tuned_again_to_the_same_bits(model, rows, sinks, tmp_path) -> None:
    """Killed between the two blocks of a window: one is on disk, the other is not."""

    class Stop(RuntimeError):
        pass

    def stop(event) -> None:
        if isinstance(event, events.BlockDone) and event.index == 3:
            raise Stop

    def job(**options):
        made = model("llama", num_hidden_layers=4)
        return AutoRound(made, dataset=rows, nblocks=2, **QUICK, **options)

    job().quantize_and_save(tmp_path / "whole", format="memory")
    whole = sinks[-1].weights
    with pytest.raises(Stop):
        job(on_event=stop).quantize_and_save(tmp_path / "out", format="memory")
    seen: list[events.Event] = []
    again = job(on_event=seen.append, resume=True)
    again.quantize_and_save(tmp_path / "out", format="memory")
    assert next(e for e in seen if isinstance(e, events.RunStarted)).resumed_blocks == 3
    assert [e.index for e in seen if isinstance(e, events.BlockStarted)] == [2, 3]
    assert all(equal(sinks[-1].weights[n], whole[n]) for n in whole)
