"""Look up algorithms, adapters and sinks."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ar_schemes import PluginHost, Registry, unknown_name
from ar_tuner import builtin, hookspecs
from ar_tuner.adapters import GenericAdapter, ModelAdapter
from ar_tuner.algorithms.base import Algorithm
from ar_tuner.auto_scheme.scorers.base import Scorer
from ar_tuner.calibration.sources import DatasetSource
from ar_tuner.errors import TunerError
from ar_tuner.stages import Stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ar_schemes import LayerPlan, PlanSize
    from ar_tuner.sink import Sink, SinkRequest
    from ar_tuner.source import Source


@functools.cache
def host() -> PluginHost:
    """Return the process's host of ar-tuner, made on first use."""
    return PluginHost("ar_tuner", hookspecs, builtins={"builtin": builtin})


@functools.cache
def _algorithms() -> Registry[Algorithm | Stage]:
    kinds = (Algorithm, Stage)
    return Registry(host(), "ar_register_algorithms", kind=kinds, name_of=lambda item: item.name)


@functools.cache
def _scorers() -> Registry[Scorer]:
    return Registry(host(), "ar_register_scorers", kind=Scorer, name_of=lambda item: item.name)


def scorer(name: str) -> Scorer:
    """Return a scorer of mixed precisions by name.

    Raises:
        TunerError: no such scorer is installed.
    """
    found = _scorers().find(name)
    if found is None:
        raise TunerError(unknown_name("method", name, _scorers().all()))
    return found


@functools.cache
def _datasets() -> Registry[DatasetSource]:
    return Registry(
        host(), "ar_register_datasets", kind=DatasetSource, name_of=lambda item: item.name
    )


def datasets() -> Mapping[str, DatasetSource]:
    """Return every named source of calibration texts, plugins' included."""
    return _datasets().all()


def algorithms() -> Mapping[str, Algorithm]:
    """Return every algorithm, plugins' included."""
    return {k: v for k, v in _algorithms().all().items() if isinstance(v, Algorithm)}


def stages() -> Mapping[str, Stage]:
    """Return every stage, plugins' included."""
    return {k: v for k, v in _algorithms().all().items() if isinstance(v, Stage)}


def stage(name: str) -> Stage:
    """Return a stage by name.

    Raises:
        TunerError: no such stage is installed.
    """
    found = _algorithms().find(name)
    if not isinstance(found, Stage):
        raise TunerError(unknown_name("stage", name, stages()))
    return found


def algorithm(name: str) -> Algorithm:
    """Return an algorithm by name.

    Raises:
        TunerError: no such algorithm is installed.
    """
    found = _algorithms().find(name)
    if not isinstance(found, Algorithm):
        raise TunerError(unknown_name("algorithm", name, algorithms()))
    return found


def find_adapter(config: Any) -> ModelAdapter:
    """Return the adapter for a model's configuration: a plugin's, or the generic rules."""
    found = host().first("ar_find_adapter", config=config)
    return GenericAdapter() if found is None else found


def scheme_for_format(format: str) -> str | None:  # noqa: A002 - the user's word
    """Return the preset that a format implies, or None."""
    found: str | None = host().first("ar_scheme_for_format", format=format)
    return found


def implied_scheme(formats: Sequence[str]) -> str:
    """Return the preset that formats imply, W4A16 where they imply none.

    Raises:
        TunerError: they imply different ones.
    """
    implied = {f: scheme_for_format(f) for f in formats}
    names = sorted({name for name in implied.values() if name is not None})
    if len(names) > 1:
        pairs = ", ".join(f"{f} implies {n}" for f, n in implied.items() if n is not None)
        msg = f"these formats cannot come from one run: {pairs}. Run them one by one."
        raise TunerError(msg)
    return names[0] if names else "W4A16"


def adjust_plan(format: str, plan: LayerPlan, config: Any) -> LayerPlan:  # noqa: A002
    """Return the plan as a format wants it."""
    found: LayerPlan | None = host().first(
        "ar_adjust_plan", format=format, plan=plan, config=config
    )
    return plan if found is None else found


def measure_plan(
    format: str,  # noqa: A002
    plan: LayerPlan,
    config: Any,
    floats: Mapping[str, tuple[tuple[int, ...], str]],
) -> PlanSize | None:
    """Return what a plan takes in a format, or None where no installed package can tell."""
    found: PlanSize | None = host().first(
        "ar_measure_plan", format=format, plan=plan, config=config, floats=floats
    )
    return found


def open_sink(request: SinkRequest) -> Sink:
    """Return the sink that writes a format.

    Raises:
        TunerError: no installed package writes it.
    """
    sink = host().first("ar_open_sink", request=request)
    if sink is None:
        msg = (
            f"no installed package writes the format {request.format!r}. "
            "`ar formats` lists those that are; ar-export brings the usual ones."
        )
        raise TunerError(msg)
    return sink


def open_source(path: Path, config: Mapping[str, Any]) -> Source:
    """Return the tensors of a checkpoint as floats.

    Raises:
        TunerError: no installed package reads it.
    """
    source: Source | None = host().first("ar_open_source", path=path, config=config)
    if source is None:
        msg = "no installed package reads this format; ar-export brings the usual ones"
        raise TunerError(msg)
    return source
