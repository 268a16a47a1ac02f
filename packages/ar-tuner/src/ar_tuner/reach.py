"""Which weights a text reaches: those with a gradient when one row of it goes through the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call

from ar_tuner.walk import hidden, trace_calls

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ar_tuner.pipeline import Job
    from ar_tuner.walk import Call

_EXPERT = re.compile(r"\.experts\.\d+\.")


def unreached_by(job: Job, example: Mapping[str, object]) -> list[str]:
    """Return the layers that the plan quantizes and that a sample gives no gradient.

    Of blocks that are not called all; of experts those of which no sibling has one either.

    Args:
        job: the walk to come; its blocks are brought into memory one by one.
        example: arguments of the model's forward.
    """
    reached: dict[str, bool] = {}
    for block in job.discovery.blocks:
        for target in job.targets(block):
            reached.setdefault(_EXPERT.sub(".experts.*.", target.ref.layer), False)

    def visit(call: Call) -> object:
        job.enter(call.index)
        for layer in _moved(job, call):
            reached[_EXPERT.sub(".experts.*.", layer)] = True
        return job.visit(call)

    modules = [block.module for block in job.blocks]
    trace_calls(job.adapter.entry(job.model), modules, example, run=visit)
    return [layer for layer, is_reached in reached.items() if not is_reached]


def _moved(job: Job, call: Call) -> list[str]:
    """Return the layers of a block whose weights have a gradient in a call."""
    block = job.blocks[call.index]
    targets = job.targets(block)
    if not targets or call.index == len(job.discovery.blocks):
        return []
    names = dict.fromkeys(t.ref.parameter for t in targets)
    weights = {n: block.module.get_parameter(n).detach().clone().requires_grad_() for n in names}

    def run(*args: object, **kwargs: object) -> object:
        with torch.enable_grad():
            return functional_call(block.module, weights, args, kwargs)

    output = hidden(job.route(call.index).run(run, call.args, call.kwargs))
    if not output.requires_grad:
        return []
    with torch.enable_grad():
        size = output.float().square().sum()
    gradients = torch.autograd.grad(size, list(weights.values()), allow_unused=True)
    found = {n for n, g in zip(weights, gradients, strict=True) if g is not None and g.any()}
    return [t.ref.layer for t in targets if t.ref.parameter in found]
