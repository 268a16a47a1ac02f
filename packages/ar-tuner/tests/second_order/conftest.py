"""What the tests of the solver share: a small block, inputs, and the error they are judged by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ar_schemes import scheme
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.parts import WeightRef
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call

if TYPE_CHECKING:
    from collections.abc import Callable


WIDTH, HIDDEN = 64, 256


class Block(nn.Module):
    """A block in the shape of a decoder's: q and k share an input, o comes after, then an MLP."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.down = nn.Linear(2 * width, width, bias=False)  # registered first, called last
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x):
        mixed = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2) / x.shape[-1] ** 0.5, -1) @ x
        x = x + self.o(mixed)
        return (x + self.down(torch.nn.functional.silu(self.up(x))),)


def correlated(rows: int, tokens: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """Return inputs [rows, tokens, width] with neighbours alike and some channels strong."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=g) * torch.linspace(0.1, 2, width)
    return torch.randn(rows, tokens, width, generator=g) @ mixing / width**0.5


def task(
    name: str = "W3A16",
    *,
    width: int = WIDTH,
    overrides: dict | None = None,
    layers: tuple[str, ...] = ("q", "k", "o", "up", "down"),
    noise: float = 0.0,
) -> BlockTask:
    torch.manual_seed(3)
    block = Block(width).requires_grad_(requires_grad=False)
    floats = correlated(16, 16, width)
    given = floats + noise * correlated(16, 16, width, seed=9)
    chosen = scheme(name)
    if chosen.weight is not None and chosen.weight.data_type == "int":
        chosen = chosen.with_overrides({"group_size": 32, **(overrides or {})})
    targets = tuple(
        Target(WeightRef(f"b.{n}", f"{n}.weight", transposed=False), chosen) for n in layers
    )
    return BlockTask(
        block=block,
        name="b",
        targets=targets,
        inputs=RowBank.of([Call(0, (x,), {}) for x in given.split(4)], [4] * 4),
        reference=rows_of([block(x)[0] for x in floats.split(4)]),
        settings=TuneSettings(iters=3, batch_size=4),
        report=lambda *_: None,
        float_inputs=RowBank.of([Call(0, (x,), {}) for x in floats.split(4)], [4] * 4),
    )


def spec_of(name: str, **changes):
    found = scheme(name).weight
    assert found is not None
    return found.with_(**changes)


def second_moment(width: int = HIDDEN) -> torch.Tensor:
    x = correlated(4, 256, width).reshape(-1, width)
    return x.t() @ x / len(x)


def weight(rows: int = 24, width: int = HIDDEN) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(7)) * 0.1


def j(difference: torch.Tensor, gram: torch.Tensor) -> float:
    """Return trace(E H E^T), the slow way."""
    e = difference.double()
    return float((e @ gram.double() @ e.t()).trace())


@pytest.fixture(name="correlated")
def _correlated() -> Callable[..., Any]:
    return correlated


@pytest.fixture(name="task")
def _task() -> Callable[..., Any]:
    return task


@pytest.fixture(name="spec_of")
def _spec_of() -> Callable[..., Any]:
    return spec_of


@pytest.fixture(name="second_moment")
def _second_moment() -> Callable[..., Any]:
    return second_moment


@pytest.fixture(name="weight")
def _weight() -> Callable[..., Any]:
    return weight


@pytest.fixture(name="j")
def _j() -> Callable[..., Any]:
    return j
