"""Backends measured shape by shape, the cache of the times, and what could be installed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ar_kernels.backends import Need, measure, select
from ar_kernels.backends.dense import Dense
from ar_kernels.backends.measure import cache_file, fastest
from ar_kernels.backends.reference import Reference
from ar_kernels.backends.select import better_if_installed, choose
from ar_schemes import Granularity, Span, TensorSpec

NEED = Need(TensorSpec(granularity=Granularity(Span.GROUP, (32,))), 64, 128, "cpu", torch.float32)


class Counting(Dense):
    """A dense backend that counts how often it is measured."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.packed = 0

    def pack(self, weight, need):
        self.packed += 1
        return super().pack(weight, need)


@pytest.fixture
def env(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_SECONDS", 0.0)
    return {"AR_KERNELS_AUTOTUNE": "1", "AR_KERNELS_CACHE": str(tmp_path)}


def test_it_is_off_unless_asked_for(tmp_path) -> None:
    pair = [Counting("a"), Counting("b")]
    assert fastest(NEED, pair, {"AR_KERNELS_CACHE": str(tmp_path)}) is None
    assert [b.packed for b in pair] == [0, 0]
    assert not list(tmp_path.iterdir())


def test_the_times_decide_and_are_measured_once_per_shape(env) -> None:
    pair = [Counting("a"), Counting("b")]
    first = fastest(NEED, pair, env)
    times = json.loads(cache_file("cpu", env).read_text())
    assert len(times) == 1
    ((key, found),) = times.items()
    assert key == "int4 group32 64x128 float32"
    assert first == min(found, key=found.get)
    assert fastest(NEED, pair, env) == first
    assert [b.packed for b in pair] == [1, 1]
    fastest(replace(NEED, rows=32), pair, env)
    assert [b.packed for b in pair] == [2, 2]


def test_a_backend_that_came_later_is_measured_alone(env) -> None:
    pair = [Counting("a"), Counting("b")]
    fastest(NEED, pair, env)
    later = Counting("c")
    assert fastest(NEED, [*pair, later], env) in "abc"
    assert [b.packed for b in (*pair, later)] == [1, 1, 1]


def test_times_of_an_earlier_run_are_used(env) -> None:
    path = cache_file("cpu", env)
    path.write_text(json.dumps({"int4 group32 64x128 float32": {"a": 2.0, "b": 1.0}}))
    assert fastest(NEED, [Counting("a"), Counting("b")], env) == "b"


def test_a_damaged_file_is_measured_anew(env) -> None:
    path = cache_file("cpu", env)
    path.write_text("{")
    assert fastest(NEED, [Counting("a"), Counting("b")], env) in "ab"
    assert json.loads(path.read_text())


def test_one_candidate_is_not_measured(env) -> None:
    only = Counting("a")
    assert fastest(NEED, [only, Reference()], env) is None
    assert only.packed == 0


def test_choose_says_that_it_was_measured(env, monkeypatch) -> None:
    monkeypatch.setattr(select, "fastest", lambda *args: "dense")
    choice = choose(NEED, env=env)
    assert choice.backend.name == "dense"
    assert dict(choice.reasons)["dense"] == "chosen: measured fastest, priority 10"
    assert choose(NEED, "reference", env=env).backend.name == "reference"


class Absent(Dense):
    name, priority, install = "absent", 99, "pip install absent"

    def missing(self) -> str | None:
        return "the package absent"


def test_a_better_backend_that_could_be_installed_is_named(monkeypatch) -> None:
    known = {b.name: b for b in (Dense(), Reference(), Absent())}
    monkeypatch.setattr(select, "backends", lambda: known)
    line = better_if_installed(NEED, Dense())
    assert line is not None
    assert line.startswith("absent would run int4 group32 [64, 128] in float32 on cpu faster")
    assert line.endswith("than dense: pip install absent")
    assert better_if_installed(NEED, Absent()) is None
    assert better_if_installed(replace(NEED, dtype=torch.int32), Dense()) is None
