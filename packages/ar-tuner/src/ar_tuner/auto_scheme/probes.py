"""Predictions against what is measured: a few layers changed one at a time, the rest as it was."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.activations import quantized_activations
from ar_tuner.auto_scheme.candidates import Inputs, ranges_of
from ar_tuner.auto_scheme.sweep import logits_of
from ar_tuner.blocks import weight_of, weights_of
from ar_tuner.parts import assembled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from ar_schemes import Scheme
    from ar_tuner.auto_scheme.candidates import Candidate
    from ar_tuner.auto_scheme.scorers import Scores, ScoreTask
    from ar_tuner.auto_scheme.space import Unit
    from ar_tuner.blocks import Block

PROBES = 16
ROWS = 16
"""Rows that a probe is measured on."""
CLEAR = 2.0
"""A prediction is measured when it is so many times the noise."""
_EVERY = 16
"""Of so many weights one is moved by the smallest step there is, to see the noise."""


@dataclass(frozen=True)
class Probe:
    """One unit under one option: what was predicted, and measured, in nats per token."""

    unit: Unit
    option: str
    predicted: float
    measured: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "layers": list(self.unit.layers),
            "option": self.option,
            "predicted_loss": self.predicted,
            "measured_loss": self.measured,
        }


def chosen(units: Sequence[Unit], losses: Scores, *, floor: float) -> list[Probe]:
    """Return units to measure: for each option some, spread over the range of predictions.

    Only those whose predicted loss is above `floor`: of others, rounding would be measured.
    """
    options = dict.fromkeys(option for _, option in losses)
    out = []
    for option in options:
        here = sorted(
            (
                Probe(unit, option, sum(losses[layer, option] for layer in unit.layers))
                for unit in units
                if all((layer, option) in losses for layer in unit.layers)
            ),
            key=lambda probe: (probe.predicted, probe.unit.name),
        )
        here = [probe for probe in here if probe.predicted > floor]
        count = min(len(here), max(2, PROBES // len(options)))
        out += [here[(2 * i + 1) * len(here) // (2 * count)] for i in range(count)]
    return out


def factors(probes: Sequence[Probe], options: Sequence[str]) -> dict[str, float]:
    """Return, by option, what predictions are to be multiplied by: the mean of logarithms.

    Options without a usable probe get the mean of all.
    """
    ratios: dict[str, list[float]] = {}
    for probe in probes:
        if probe.measured > 0 and probe.predicted > 0:
            ratios.setdefault(probe.option, []).append(math.log(probe.measured / probe.predicted))
    every = [r for found in ratios.values() for r in found]
    overall = math.exp(sum(every) / len(every)) if every else 1.0
    return {
        option: math.exp(sum(found) / len(found)) if (found := ratios.get(option)) else overall
        for option in options
    }


def measured(
    task: ScoreTask,
    probes: Sequence[Probe],
    report: Callable[[int, int], None],
    *,
    noise: float = 0.0,
) -> list[Probe]:
    """Return the probes with their divergence from the float model on the first rows.

    `noise` is taken off: see `measured_noise`.
    """
    rows = _rows(task)
    found = _divergences(task, rows, _changes(task, probes, rows), report)
    return [
        Probe(probe.unit, probe.option, probe.predicted, max(0.0, loss - noise))
        for probe, loss in zip(probes, found, strict=True)
    ]


def measured_noise(task: ScoreTask) -> float:
    """Return the divergence that any change causes, however small: that of rounded activations.

    In bfloat16 it is as large as what 4 bits lose in one layer of a small model.
    """
    block = task.blocks[0].module
    parameter = next(p for p in block.parameters() if p.ndim > 1)

    @contextlib.contextmanager
    def nudged() -> Iterator[None]:
        kept = parameter.data
        moved = kept.clone().reshape(-1)
        part = moved[::_EVERY]
        moved[::_EVERY] = torch.nextafter(part, torch.full_like(part, torch.inf))
        try:
            parameter.data = moved.reshape(kept.shape)
            yield
        finally:
            parameter.data = kept

    return _divergences(task, _rows(task), [nudged], lambda done, total: None)[0]


def _rows(task: ScoreTask) -> Tensor:
    return task.rows[:ROWS].to(next(task.model.parameters()).device)


def _divergences(
    task: ScoreTask,
    rows: Tensor,
    changes: Sequence[Callable[[], AbstractContextManager[None]]],
    report: Callable[[int, int], None],
) -> list[float]:
    """Return the divergence in nats per token that each change alone causes."""
    totals = [0.0] * len(changes)
    with torch.no_grad():
        for done in range(len(rows)):
            batch = rows[done : done + 1]
            reference = _log_probs(task, batch)
            for number, change in enumerate(changes):
                with change():
                    other = _log_probs(task, batch)
                totals[number] += float((reference.exp() * (reference - other)).sum())
            report(done + 1, len(rows))
    return [total / rows.numel() for total in totals]


@dataclass(frozen=True)
class _Change:
    """Candidates to put in the place of parameters for a while, and the ranges of their inputs."""

    places: tuple[tuple[nn.Module, Tensor, Candidate], ...]
    ranges: dict[str, Tensor]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        kept = [parameter.data for _, parameter, _ in self.places]
        active = [(m, c.target) for m, _, c in self.places if c.activation is not None]
        with contextlib.ExitStack() as stack:
            for module, target in active:
                stack.enter_context(quantized_activations(module, (target,), self.ranges))
            try:
                for parameter, candidates in self._by_parameter():
                    pairs = ((c.target.ref, c.weight()) for c in candidates)
                    (made,) = assembled(pairs, lambda _, p=parameter: p.data).values()  # type: ignore[misc]
                    parameter.data = made.contiguous()
                yield
            finally:
                for (_, parameter, _), data in zip(self.places, kept, strict=True):
                    parameter.data = data

    def _by_parameter(self) -> list[tuple[Tensor, list[Candidate]]]:
        groups: dict[int, tuple[Tensor, list[Candidate]]] = {}
        for _, parameter, candidate in self.places:
            groups.setdefault(id(parameter), (parameter, []))[1].append(candidate)
        return list(groups.values())


def _changes(
    task: ScoreTask, probes: Sequence[Probe], rows: Tensor
) -> list[Callable[[], AbstractContextManager[None]]]:
    blocks = {block.name: block for block in task.blocks}
    wanted: dict[str, list[str]] = {}
    for probe in probes:
        for layer in probe.unit.layers:
            name = task.layers[layer].block
            if name is not None and layer not in wanted.setdefault(name, []):
                wanted[name].append(layer)
    inputs = {name: Inputs() for name in wanted}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, layers in wanted.items():
            refs = weights_of(blocks[name], layers)
            stack.enter_context(inputs[name].gathered(blocks[name].module, refs))
        for row in rows:
            _log_probs(task, row[None])
    return [_change(task, probe, blocks, inputs).installed for probe in probes]


def _change(
    task: ScoreTask, probe: Probe, blocks: dict[str, Block], inputs: dict[str, Inputs]
) -> _Change:
    places: list[tuple[nn.Module, Tensor, Candidate]] = []
    ranges: dict[str, Tensor] = {}
    by_block: dict[str | None, dict[str, Scheme]] = {}
    for name in probe.unit.layers:
        mine = by_block.setdefault(task.layers[name].block, {})
        mine[name] = task.open_to[name][probe.option]
    for where, schemes in by_block.items():
        if where is None:
            for name, which in schemes.items():
                module = task.model.get_submodule(name)
                made = task.maker.outside(module, name, which)
                places.append((module, weight_of(module), made))
            continue
        block = blocks[where]
        open_to = {name: {probe.option: which} for name, which in schemes.items()}
        for candidate in task.maker.of_block(block, open_to, inputs[where]).values():
            parameter = block.module.get_parameter(candidate.target.ref.parameter)
            places.append((block.module, parameter, candidate))
        ranges |= ranges_of(schemes, inputs[where])
    return _Change(tuple(places), ranges)


def _log_probs(task: ScoreTask, rows: Tensor) -> Tensor:
    entry = task.adapter.entry(task.model)
    logits = logits_of(entry(**task.adapter.inputs(task.model, rows)))
    return torch.log_softmax(logits.float(), -1)
