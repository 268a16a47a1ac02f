"""Hooks that ar-tuner calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from ar_schemes import LayerPlan, PlanSize
    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.algorithms.base import Algorithm
    from ar_tuner.auto_scheme.scorers import Scorer
    from ar_tuner.calibration.sources import DatasetSource
    from ar_tuner.events import RunEvent
    from ar_tuner.sink import Sink, SinkRequest
    from ar_tuner.source import Source
    from ar_tuner.stages import Stage

hookspec = pluggy.HookspecMarker("ar_tuner")
hookimpl = pluggy.HookimplMarker("ar_tuner")


@hookspec
def ar_register_algorithms() -> Iterable[Algorithm | Stage]:  # type: ignore[empty-body]
    """Return algorithms (from one block and its inputs to quantized weights) and stages.

    A stage refines the whole quantized model once its blocks are done.
    """


@hookspec
def ar_register_datasets() -> Iterable[DatasetSource]:  # type: ignore[empty-body]
    """Return named calibration sources: a name to records of texts, chats or token ids.

    A set on a hub needs no code: return an `ar_tuner.calibration.HubSet` that describes it.
    """


@hookspec
def ar_register_scorers() -> Iterable[Scorer]:  # type: ignore[empty-body]
    """Return scorers: what the model would lose by each scheme of each layer (`AutoScheme`)."""


@hookspec(firstresult=True)
def ar_find_adapter(config: Any) -> ModelAdapter | None:
    """Return an adapter for a model's configuration, or None. Stops at the first result."""


@hookspec(firstresult=True)
def ar_open_source(path: Path, config: Mapping[str, Any]) -> Source | None:
    """Return the tensors of the checkpoint in a directory as floats, or None. First result wins.

    `config` is its config.json. A checkpoint that is quantized in a format of yours is a source
    like any other: it stands for the floats its codes mean.
    """


@hookspec(firstresult=True)
def ar_open_sink(request: SinkRequest) -> Sink | None:
    """Return the sink of a format, or None when the format is not yours. First result wins.

    Whatever makes the request impossible (a layer the format cannot carry, an output directory
    that is not empty) is raised here, before any work.
    """


@hookspec(firstresult=True)
def ar_scheme_for_format(format: str) -> str | None:  # noqa: A002 - the user's word
    """Return the preset that a format implies (`gguf:q4_k_m`), or None. First result wins.

    It is used when the user names no scheme.
    """


@hookspec(firstresult=True)
def ar_adjust_plan(format: str, plan: LayerPlan, config: Any) -> LayerPlan | None:  # noqa: A002
    """Return the plan as a format wants it (a mix of types over the layers), or None.

    `config` is the model's configuration as plain values. First result wins.
    """


@hookspec(firstresult=True)
def ar_measure_plan(
    format: str,  # noqa: A002
    plan: LayerPlan,
    config: Any,
    floats: Mapping[str, tuple[tuple[int, ...], str]],
) -> PlanSize | None:
    """Return what a plan takes in the weight files of a format, exact to the byte for its layers.

    `config` is the model's configuration as plain values, `floats` shape and type (`bfloat16`) of
    the tensors that the plan leaves as they are, by name. First result wins.
    """


@hookspec
def ar_run_event(event: RunEvent) -> None:
    """Take note of an event of a run. The result is ignored and cannot change the run."""
