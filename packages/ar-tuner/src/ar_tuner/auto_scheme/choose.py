"""From a request to a choice: space, scores, solution."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner import events
from ar_tuner.auto_scheme.cache import ScoreCache, default_path
from ar_tuner.auto_scheme.candidates import Maker
from ar_tuner.auto_scheme.front import Choice
from ar_tuner.auto_scheme.objective import (
    bits_of,
    budget_for,
    bytes_for,
    front_of,
    loss_of,
    solved,
)
from ar_tuner.auto_scheme.scorers.base import ScoreTask
from ar_tuner.auto_scheme.space import find_space
from ar_tuner.loading import checked_device
from ar_tuner.progress import peak_bytes
from ar_tuner.registry import scorer
from ar_tuner.run.fingerprint import model_digest, rows_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from ar_schemes import LayerPlan, Scheme
    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.auto_scheme.objective import Budget
    from ar_tuner.auto_scheme.request import AutoScheme
    from ar_tuner.auto_scheme.scorers import Scores
    from ar_tuner.auto_scheme.space import Space, Terrain
    from ar_tuner.blocks import Discovery
    from ar_tuner.events import RunEvent

_RETRIES = 8


class Chooser:
    """Chooses the schemes of one model; layers are scored once, however often it is asked."""

    def __init__(
        self,
        asked: AutoScheme,
        *,
        source: Path | None,
        rows: Callable[[Any, int, int, int], Tensor],
        emit: Callable[[RunEvent], None],
    ) -> None:
        """Take what stays the same.

        `rows` returns token rows for (dataset, nsamples, seqlen, seed), `emit` tells listeners.
        """
        self.asked = asked
        self.choices: tuple[Choice, ...] = ()
        self._source = source
        self._rows = rows
        self._emit = emit
        self._scores: dict[str, Scores] = {}
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

    def choose(
        self, terrain: Terrain, model: nn.Module, adapter: ModelAdapter, discovery: Discovery
    ) -> list[LayerPlan]:
        """Return the plan of each target, and keep what was chosen in `choices`."""
        began = time.perf_counter()
        space = find_space(self.asked, terrain)
        budgets = self._budgets(space)
        losses = self._scored(space, model, adapter, discovery)
        chosen, plans = [], []
        for budget in budgets:
            picks = self._within(space, terrain, budget, losses)
            choice = Choice(
                target=budget.target,
                picks=picks,
                bits=bits_of(space, picks, codes_only=budget.codes_only),
                bytes=bytes_for(space, picks),
                loss=loss_of(picks, losses),
                measured=None,
                front=front_of(space, budget, losses),
            )
            chosen.append(choice)
            plans.append(terrain.plan(space.schemes(picks)))
            self._emit(_chosen(choice, time.perf_counter() - began))
        self.choices = tuple(chosen)
        return plans

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

    def _scored(
        self, space: Space, model: nn.Module, adapter: ModelAdapter, discovery: Discovery
    ) -> Scores:
        asked = self.asked
        numbers = [asked.number(n) for n in ("nsamples", "seqlen")]
        rows = self._rows(asked.dataset, numbers[0], numbers[1], asked.seed)
        open_to = {
            layer: {o: space.options[o] for o in space.options if (layer, o) in space.bits}
            for layer in space.layers
        }
        key = {
            "model": model_digest(model, self._source),
            "text": rows_digest(rows),
            "method": asked.scorer,
            "batch_size": asked.number("batch_size"),
            "seed": asked.seed,
            "torch": torch.__version__.split("+")[0],
        }
        cache = ScoreCache(_cache_path(asked, key), key)
        known = cache.known(open_to)
        task = ScoreTask(
            model=model,
            adapter=adapter,
            blocks=discovery.blocks,
            layers=space.layers,
            open_to=open_to,
            rows=rows,
            batch_size=asked.number("batch_size"),
            seed=asked.seed,
            by_block=asked.low_gpu_mem_usage,
            maker=Maker(bool(asked.enable_torch_compile), as_codes=asked.low_cpu_mem_usage),
            known=known,
            save=lambda layer, values: cache.save(layer, values, open_to[layer]),
            report=self._reporter("scoring"),
        )
        chosen = scorer(asked.scorer)
        values = known
        if any(task.missing(layer) for layer in space.layers):
            with moved(model, asked.device_map):
                values = {**known, **chosen.values(task)}
        return chosen.scores(values, rows.numel())

    def _reporter(self, stage: str) -> Callable[[int, int], None]:
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


def commonest(schemes: Mapping[str, Scheme], weights: Mapping[str, int]) -> Scheme:
    """Return the scheme that most weights have, of those that quantize."""
    count: Counter[Scheme] = Counter()
    for layer, which in schemes.items():
        if which.weight is not None:
            count[which] += weights[layer]
    return count.most_common(1)[0][0]


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
        measured_loss=choice.measured,
        layers=Counter(choice.picks.values()),
        seconds=seconds,
    )
