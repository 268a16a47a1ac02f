"""From a request to a choice: space, scores, solution."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ar_tuner import events
from ar_tuner.auto_scheme.cache import ScoreCache, default_path
from ar_tuner.auto_scheme.candidates import Maker
from ar_tuner.auto_scheme.front import Choice
from ar_tuner.auto_scheme.objective import (
    bits_of,
    budget_for,
    front_of,
    loss_of,
    solved,
)
from ar_tuner.auto_scheme.probes import CLEAR, factors, measured, measured_noise
from ar_tuner.auto_scheme.probes import chosen as chosen_probes
from ar_tuner.auto_scheme.scorers.base import ScoreTask
from ar_tuner.auto_scheme.space import find_space
from ar_tuner.devices import checked_device
from ar_tuner.progress import peak_bytes
from ar_tuner.registry import scorer
from ar_tuner.run.fingerprint import model_digest, rows_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from ar_schemes import LayerPlan
    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.auto_scheme.objective import Budget
    from ar_tuner.auto_scheme.probes import Probe
    from ar_tuner.auto_scheme.request import AutoScheme
    from ar_tuner.auto_scheme.scorers import Scores
    from ar_tuner.auto_scheme.space import Space
    from ar_tuner.auto_scheme.terrain import Terrain
    from ar_tuner.blocks import Block
    from ar_tuner.events import RunEvent

_RETRIES = 8
_VERSION = 1
"""Of what scores and measurements mean; raised when they come to mean something else."""


@dataclass(frozen=True)
class Subject:
    """The model to choose for, with its float weights; `rows` gives the tokens to score with."""

    model: nn.Module
    adapter: ModelAdapter
    blocks: tuple[Block, ...]
    rows: Callable[[], Tensor]


class Chooser:
    """Chooses the schemes of one model; layers are scored once, however often it is asked.

    Args:
        asked: what the user wants.
        source: directory of the model, None for one in memory.
        emit: tells listeners of an event.

    Attributes:
        choices: what was chosen, one for each target.
        plans: the plans of that.
        probes: predictions that were checked by measuring.
    """

    def __init__(
        self, asked: AutoScheme, *, source: Path | None, emit: Callable[[RunEvent], None]
    ) -> None:
        self.asked = asked
        self.choices: tuple[Choice, ...] = ()
        self.plans: tuple[LayerPlan, ...] = ()
        self._source = source
        self.probes: tuple[Probe, ...] = ()
        self._emit = emit
        self._rows: Tensor | None = None
        self._cache: ScoreCache | None = None
        scorer(asked.scorer)  # an unknown method is refused before work

    def draft(self, terrain: Terrain) -> LayerPlan:
        """Return a plan in which every option occurs, before anything is scored.

        Raises:
            TunerError: the target cannot be reached, or an option fits nowhere.
        """
        space = find_space(self.asked, terrain)
        self._budgets(space)
        picks = {
            layer: unit.options[number % len(unit.options)]
            for number, unit in enumerate(space.units)
            for layer in unit.layers
        }
        return terrain.plan(space.schemes(picks))

    def choose(self, terrain: Terrain, subject: Subject) -> LayerPlan:
        """Return the plan of the first target, and keep all that was chosen."""
        began = time.perf_counter()
        space = find_space(self.asked, terrain)
        budgets = self._budgets(space)
        losses = self._scored(space, subject)
        chosen, plans = [], []
        for budget in budgets:
            picks = self._within(space, terrain, budget, losses)
            choice = Choice(
                target=budget.target,
                picks=picks,
                bits=bits_of(space, picks, codes_only=budget.codes_only),
                bytes=terrain.size(terrain.plan(space.schemes(picks))).total,
                loss=loss_of(picks, losses),
                front=front_of(space, budget, losses),
            )
            chosen.append(choice)
            plans.append(terrain.plan(space.schemes(picks)))
            self._emit(_chosen(choice, time.perf_counter() - began))
        self.choices, self.plans = tuple(chosen), tuple(plans)
        return plans[0]

    def to_dict(self) -> dict[str, Any]:
        """Return choices and probes as plain values."""
        return {
            "method": self.asked.scorer,
            "options": list(self.asked.schemes),
            "choices": [choice.to_dict() for choice in self.choices],
            "probes": [probe.to_dict() for probe in self.probes],
        }

    def _budgets(self, space: Space) -> list[Budget]:
        asked = self.asked
        if asked.target_bytes is not None:
            return [budget_for(space, size=asked.target_bytes, codes_only=False)]
        codes_only = asked.ignore_scale_zp_bits
        return [budget_for(space, avg_bits=t, codes_only=codes_only) for t in asked.targets]

    def _within(
        self, space: Space, terrain: Terrain, budget: Budget, losses: Scores
    ) -> dict[str, str]:
        """Return the best choice whose files are no larger than asked for.

        Bytes beside the layers depend a little on the choice (names in headers, the packing of a
        mix), so the plan is measured, and the budget cut by what it is over.
        """
        picks = solved(space, budget, losses)
        for _ in range(_RETRIES if budget.by_size else 0):
            over = terrain.size(terrain.plan(space.schemes(picks))).total - int(budget.target)
            if over <= 0:
                break
            budget = dataclasses.replace(budget, limit=budget.limit - 8 * over)
            picks = solved(space, budget, losses)
        return picks

    def _scored(self, space: Space, subject: Subject) -> Scores:
        asked = self.asked
        if self._rows is None:
            self._rows = subject.rows()
        if self._cache is None:
            self._cache = self._open_cache(subject.model, self._rows)
        cache = self._cache
        open_to = {
            layer: {o: space.options[o] for o in space.options if (layer, o) in space.bits}
            for layer in space.layers
        }
        known = cache.known(open_to)
        task = ScoreTask(
            model=subject.model,
            adapter=subject.adapter,
            blocks=subject.blocks,
            layers=space.layers,
            open_to=open_to,
            rows=self._rows,
            batch_size=asked.number("batch_size"),
            seed=asked.seed,
            by_block=asked.low_gpu_mem_usage,
            maker=Maker(bool(asked.enable_torch_compile), as_codes=asked.low_cpu_mem_usage),
            known=known,
            save=lambda layer, values: cache.save(layer, values, open_to[layer]),
            report=self._reporter("scoring"),
        )
        chosen = scorer(asked.scorer)
        with moved(subject.model, asked.device_map):
            found = known
            if any(task.missing(layer) for layer in space.layers):
                found = {**known, **chosen.values(task)}
            # in one order, whatever was known before: sums depend on it
            values = {
                layer: {o: found[layer][o] for o in open_to[layer] if o in found[layer]}
                for layer in space.layers
            }
            losses = chosen.scores(values, self._rows.numel())
            if not (asked.calibrate and chosen.calibrated):
                return losses
            self.probes = self._probed(space, task, losses)
        scale = factors(self.probes, list(space.options))
        return {(layer, o): loss * scale[o] for (layer, o), loss in losses.items()}

    def _probed(self, space: Space, task: ScoreTask, losses: Scores) -> tuple[Probe, ...]:
        """Return predictions beside measurements; what the cache has is not measured again."""
        assert self._cache is not None
        cache, options = self._cache, space.options
        noise = cache.noise
        if noise is None:
            noise = cache.noise = measured_noise(task)
        probes = chosen_probes(space.units, losses, floor=CLEAR * noise)
        new = [p for p in probes if cache.measured(p.unit.layers, options[p.option]) is None]
        if new:
            done = measured(task, new, self._reporter("probing"), noise=noise)
            cache.save_measured((p.unit.layers, options[p.option], p.measured) for p in done)
        return tuple(
            dataclasses.replace(p, measured=cache.measured(p.unit.layers, options[p.option]) or 0.0)
            for p in probes
        )

    def _open_cache(self, model: nn.Module, rows: Tensor) -> ScoreCache:
        asked = self.asked
        key = {
            "model": model_digest(model, self._source),
            "text": rows_digest(rows),
            "method": asked.scorer,
            "batch_size": asked.number("batch_size"),
            "seed": asked.seed,
            "torch": torch.__version__.split("+")[0],
            "ar": _VERSION,
        }
        return ScoreCache(_cache_path(asked, key), key)

    def _reporter(self, stage: Literal["scoring", "probing"]) -> Callable[[int, int], None]:
        began = time.perf_counter()

        def report(done: int, total: int) -> None:
            spent = time.perf_counter() - began
            left = spent / done * (total - done) if done else None
            self._emit(events.ScoringProgress(stage, done, total, spent, peak_bytes(), left))

        return report


@contextlib.contextmanager
def moved(model: nn.Module, device: str | None) -> Iterator[None]:
    """Keep a model on another device, as long as the context lasts."""
    home = next(model.parameters()).device
    away = home if device is None else checked_device(device)
    if away == home:
        yield
        return
    model.to(away)
    try:
        yield
    finally:
        model.to(home)


def _cache_path(asked: AutoScheme, key: Mapping[str, Any]) -> Path | None:
    if asked.cache is False:
        return None
    if asked.cache is None or asked.cache is True:
        return default_path(key)
    return Path(asked.cache)


def _chosen(choice: Choice, seconds: float) -> events.SchemeChosen:
    return events.SchemeChosen(
        target=choice.target,
        bits=choice.bits,
        bytes=choice.bytes,
        predicted_loss=choice.loss,
        layers=Counter(choice.picks.values()),
        seconds=seconds,
    )
