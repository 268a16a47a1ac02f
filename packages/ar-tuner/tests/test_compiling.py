from __future__ import annotations

import pytest
import torch
from torch import nn

from ar_tuner import AutoRound, events
from ar_tuner.compiling import Compiled, plain, refusal

QUICK = {
    **{"iters": 3, "nsamples": 8, "seqlen": 32, "batch_size": 4, "group_size": 32},
    "algorithm": "signround",
}


class Broken(nn.Module):
    """Cannot be compiled as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, x):
        torch._dynamo.graph_break()
        return x @ self.weight


def test_compiled_blocks_are_tuned_to_the_same_weights(model, rows) -> None:
    """The backend runs what was traced operation by operation, so nothing may differ."""
    states = []
    for compiled in (False, True):
        told = []
        job = AutoRound(model(), dataset=rows, **QUICK)
        if compiled:
            job.tune_with(Compiled(told.append, backend="aot_eager"))
        states.append(job.quantize()[0].state_dict())
        assert told == []
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_block_that_cannot_be_compiled_runs_as_it_is_and_says_so() -> None:
    told = []
    forward = Compiled(told.append, backend="eager")
    block, x = Broken(), torch.eye(2)
    for _ in range(2):
        weight = torch.full((2, 2), 3.0, requires_grad=True)
        out = forward(block, {"weight": weight}, (x,), {})
        assert torch.equal(out, weight)
        out.sum().backward()
        assert torch.equal(weight.grad, torch.ones(2, 2))
    assert len(told) == 1
    assert told[0].startswith("Broken cannot be compiled and is tuned as it is: ")


def test_an_error_of_the_block_itself_is_not_hidden() -> None:
    forward = Compiled(lambda _: None, backend="eager")
    with pytest.raises(RuntimeError):
        forward(nn.Linear(2, 2), {}, (torch.ones(1, 3),), {})


def test_calls_without_gradients_are_not_compiled() -> None:
    forward = Compiled(lambda _: None, backend="no such backend")
    block = nn.Linear(2, 2)
    with torch.no_grad():
        out = forward(block, {}, (torch.ones(1, 2),), {})
    assert torch.equal(out, plain(block, {}, (torch.ones(1, 2),), {}))


def test_a_machine_that_can_compile_nothing_is_found_out_before_work(
    model, rows, monkeypatch
) -> None:
    def fail(_graph, _inputs):
        raise RuntimeError("no compiler\nat all")

    why = refusal(torch.device("cpu"), backend=fail)
    assert why == "RuntimeError: no compiler"
    assert refusal(torch.device("cpu"), backend="eager") is None
    monkeypatch.setattr("ar_tuner.api.refusal", lambda device: "no compiler")
    seen = []
    made = AutoRound(
        model(), dataset=rows, enable_torch_compile=True, on_event=seen.append, **QUICK
    )
    assert made.forward() is plain
    made.quantize()
    notes = [e for e in seen if isinstance(e, events.Note)]
    assert [n.text for n in notes] == [
        "nothing can be compiled here, so blocks are tuned as they are: no compiler"
    ]


@pytest.mark.slow
def test_inductor_gives_the_same_loss_within_noise(model, rows) -> None:
    losses = []
    for compiled in (False, True, True):
        seen = []
        job = AutoRound(
            model(), dataset=rows, enable_torch_compile=compiled, on_event=seen.append, **QUICK
        )
        job.quantize()
        assert not [e for e in seen if isinstance(e, events.Note) and e.level == "warning"]
        losses.append([e.loss_after for e in seen if isinstance(e, events.BlockDone)])
    assert losses[1] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
