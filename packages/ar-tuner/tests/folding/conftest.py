"""Blocks to fold in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ar_schemes import scheme
from ar_tuner.adapters import GenericAdapter
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.blocks import WeightRef, find_blocks, is_linear
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call, hidden, suspended

if TYPE_CHECKING:
    from collections.abc import Callable


def uneven(made: nn.Module) -> nn.Module:
    """Return a model with norms whose channels differ by far, as those of trained models do."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in made.modules():
            if "norm" in type(module).__name__.lower():
                for key, p in module.named_parameters(recurse=False):
                    noise = torch.randn(p.shape, generator=g)
                    p.copy_(noise * 0.2 if key == "bias" else noise.mul(1.2).exp())
            if is_linear(module):
                module.weight.mul_(3.0)
    return made


def task_of(made: nn.Module, rows: torch.Tensor, name: str = "W2A16", index: int = 0) -> BlockTask:
    """Return the task of one block, with the float model's inputs."""
    adapter = GenericAdapter()
    block = find_blocks(made, adapter).blocks[index]
    with suspended(adapter.entry(made), [block.module], [adapter.inputs(made, rows)]) as frames:
        call = frames[0].call
        with torch.no_grad():
            output = hidden(block.module(*call.args, **call.kwargs))
    wanted = scheme(name).with_overrides({"group_size": 32})
    targets = tuple(
        Target(
            WeightRef(f"{block.name}.{n}", f"{n}.weight", transposed=not isinstance(m, nn.Linear)),
            wanted,
        )
        for n, m in block.module.named_modules()
        if is_linear(m)
    )
    return BlockTask(
        block=block.module,
        name=block.name,
        targets=targets,
        inputs=RowBank.of([Call(0, call.args, call.kwargs)], [len(rows)]),
        reference=rows_of([output]),
        settings=TuneSettings(batch_size=8),
        report=lambda *_: None,
    )


@pytest.fixture(name="uneven")
def _uneven() -> Callable[..., Any]:
    return uneven


@pytest.fixture(name="task_of")
def _task_of() -> Callable[..., Any]:
    return task_of
