from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from ar_tuner import AutoRound
from ar_tuner.events import Note
from ar_tuner.parts import WeightRef
from ar_tuner.reach import remark, unreached
from ar_tuner.testing import tiny_model, tiny_rows


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.taken = nn.Linear(8, 8), nn.Linear(8, 8)
        self.idle, self.chooses = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, seen: list | None = None) -> tuple[torch.Tensor]:
        y = functional.linear(self.used(x), self.taken.weight)
        if seen is not None:
            seen.append(y)
        return (y[:, self.chooses(x).sum(-1).topk(2).indices[0]],)


def refs(*names: str) -> list[WeightRef]:
    return [WeightRef(f"model.layers.0.{n}", f"{n}.weight", transposed=False) for n in names]


def test_layers_that_are_not_called_or_only_choose_are_found() -> None:
    every = refs("used", "taken", "idle", "chooses")
    found = unreached(Block(), every, (torch.randn(1, 4, 8),), {})
    assert [ref.parameter for ref in found] == ["idle.weight", "chooses.weight"]


def test_the_callers_containers_are_left_alone() -> None:
    seen: list[torch.Tensor] = []
    unreached(Block(), refs("used"), (torch.randn(1, 4, 8), seen), {})
    assert seen == []


def test_the_remark_names_block_and_layers() -> None:
    text = remark("model.layers.0", refs("idle", "chooses"))
    assert text.startswith("model.layers.0: ")
    assert "idle, chooses (2 layers)" in text


def test_a_run_tells_of_cross_attention_that_text_does_not_reach() -> None:
    pytest.importorskip("transformers")
    notes: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    settings = {"iters": 1, "nsamples": 2, "seqlen": 16, "algorithm": "signround"}
    job = AutoRound(
        tiny_model("bart"),
        group_size=32,
        dataset=list(tiny_rows(2, 16)),
        on_event=listen,
        **settings,
    )
    job.quantize()
    told = [note for note in notes if "does not reach" in note]
    assert len(told) == 4
    assert "encoder_attn.q_proj" in told[0]
