"""Finds the exact weight of a layer of a finished checkpoint, while its run is at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_tuner.leftovers import kept, source_names

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ar_kernels import QuantizedWeight
    from ar_tuner.api import AutoRound, Prepared
    from ar_tuner.pipeline import Job
    from ar_tuner.run import Run


def weight_finder(
    request: AutoRound,
    prepared: Prepared,
    job: Job,
    run: Run,
    outside: Mapping[str, QuantizedWeight],
) -> Callable[[str], QuantizedWeight]:
    """Return a function from a layer's name in the files to its exact weight."""
    names = {
        source.removesuffix(".weight"): model.removesuffix(".weight")
        for model, source in source_names(request, prepared).items()
    }
    index_of = {b.name: i for i, b in enumerate(job.blocks)}
    refined = run.load_block(len(job.blocks))[0] if len(job.blocks) in run.finished else {}
    stored = kept(request, prepared)

    def find(layer: str) -> QuantizedWeight:
        if layer in stored:
            return stored[layer]()
        layer = names.get(layer, layer)
        if layer in outside:
            return outside[layer]
        if layer in refined:
            return refined[layer]
        block = prepared.plan[layer].layer.block
        return run.load_block(index_of[layer if block is None else block])[0][layer]

    return find
