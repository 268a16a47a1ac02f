"""A plugin that implements every hook of every host, and a report of what became of each.

`python ar_every_hook.py` prints the report as JSON; tests/test_hooks.py makes it a distribution.
"""

from __future__ import annotations

import json
import sys
import types

import click
import pluggy

HEARD: list[str] = []
schemes_impl = pluggy.HookimplMarker("ar_schemes")
kernels_impl = pluggy.HookimplMarker("ar_kernels")
tuner_impl = pluggy.HookimplMarker("ar_tuner")
export_impl = pluggy.HookimplMarker("ar_export")
cli_impl = pluggy.HookimplMarker("ar_cli")


@schemes_impl
def ar_register_schemes():
    from ar_schemes import Scheme, scheme

    spec = scheme("W4A16").weight.with_(data_type="every_int")
    return [Scheme(name="EVERY4", weight=spec)]


@kernels_impl
def ar_register_data_types():
    from ar_kernels.numerics.integer import Integer

    class EveryInt(Integer):
        name = "every_int"

    return [EveryInt()]


@kernels_impl
def ar_register_layouts():
    from ar_kernels.layouts.gptq import GptqLayout

    return [GptqLayout("every_layout", 0)]


@kernels_impl
def ar_register_backends():
    from ar_kernels.backends.reference import Reference

    class EveryBackend(Reference):
        name = "every_backend"
        priority = -1

    return [EveryBackend()]


@kernels_impl
def ar_choose_backend(need, usable):
    HEARD.append("ar_choose_backend")
    return usable[-1].name


@tuner_impl
def ar_register_algorithms():
    from ar_tuner.algorithms.rtn import Rtn
    from ar_tuner.stages import ModelResult

    class EveryAlgorithm(Rtn):
        name = "every_algorithm"

    class EveryStage:
        name = "every_stage"

        def refine(self, task):
            return ModelResult()

    return [EveryAlgorithm(), EveryStage()]


@tuner_impl
def ar_register_scorers():
    class EveryScorer:
        name = "every_scorer"
        calibrated = False

        def values(self, task):
            return {n: {o: (1.0,) for o in task.open_to[n]} for n in task.layers}

        def scores(self, values, tokens):
            return {(n, o): 1.0 / len(o) for n, named in values.items() for o in named}

    return [EveryScorer()]


@tuner_impl
def ar_measure_plan(format, plan, config, floats):
    from ar_schemes import PlanSize

    return PlanSize({"layer": len(plan)}, len(floats)) if format == "every" else None


@tuner_impl
def ar_register_datasets():
    from ar_tuner.calibration.sources import EmbeddedTexts

    class EveryTexts(EmbeddedTexts):
        name = "every_texts"

        def records(self, query):
            return [f"{split} text" for split in query.splits]

    return [EveryTexts()]


@tuner_impl
def ar_find_adapter(config):
    from ar_tuner.adapters import GenericAdapter

    found = GenericAdapter()
    found.name = f"every-{config}"
    return found


@tuner_impl
def ar_open_source(path, config):
    return f"floats of {path}" if config.get("every") else None


@tuner_impl
def ar_open_sink(request):
    return "a sink" if request.format == "every" else None


@tuner_impl
def ar_scheme_for_format(format):
    return "EVERY4" if format == "every" else None


@tuner_impl
def ar_adjust_plan(format, plan, config):
    return f"{plan} {config} {format}" if format == "every" else None


@tuner_impl
def ar_run_event(event):
    HEARD.append(f"ar_run_event {event.text}")


@export_impl
def ar_register_formats():
    from ar_export.formats.fake import FakeFormat

    class EveryFormat(FakeFormat):
        name = "every_format"
        spellings = ("every_format", "every:other")

    return [EveryFormat()]


@cli_impl
def ar_register_commands():
    return [click.Command("every")]


def report() -> dict[str, object]:
    """Return what each hook brought about."""
    import torch

    import ar_cli.registry
    import ar_export
    import ar_kernels.registry as kernels
    import ar_tuner.registry as tuner
    from ar_kernels.backends.base import Need
    from ar_kernels.backends.select import choose
    from ar_schemes import schemes
    from ar_tuner.calibration import Query, parse_sets
    from ar_tuner.calibration.sources import open_set
    from ar_tuner.events import Note
    from ar_tuner.settings import Settings

    spec = schemes()["EVERY4"].weight
    need = Need(spec, rows=64, columns=128, device="cpu", dtype=torch.float32)
    tuner.host().notify("ar_run_event", event=Note("info", "hello"))
    return {
        "ar_register_schemes": spec.data_type,
        "ar_register_data_types": kernels.data_type("every_int").name,
        "ar_register_layouts": kernels.layout("every_layout").name,
        "ar_register_backends": kernels.backend("every_backend").name,
        "ar_choose_backend": choose(need).backend.name,
        "ar_register_algorithms": tuner.algorithm("every_algorithm").name,
        "stage": [tuner.stage("every_stage").name, Settings(stage="every_stage").chosen.stage],
        "ar_register_datasets": [
            *open_set(*parse_sets("every_texts"), tuner.datasets(), Query(("train",)))
        ],
        "ar_find_adapter": tuner.find_adapter("config").name,
        "ar_open_source": tuner.open_source("a directory", {"every": True}),
        "ar_open_sink": tuner.open_sink(types.SimpleNamespace(format="every")),
        "ar_scheme_for_format": tuner.scheme_for_format("every"),
        "ar_adjust_plan": tuner.adjust_plan("every", "plan", "for"),
        "ar_register_scorers": tuner.scorer("every_scorer").name,
        "ar_measure_plan": tuner.measure_plan("every", "plan", {}, {"a": ((1,), "int8")}).total,
        "ar_register_formats": ar_export.format("every:other").name,
        "ar_register_commands": ar_cli.registry.command("every").name,
        "heard": HEARD,
    }


if __name__ == "__main__":
    import ar_every_hook

    print(json.dumps(ar_every_hook.report()))
    sys.exit()
