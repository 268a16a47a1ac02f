"""The walk over all blocks: float reference, tuning, quantized continuation."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.activations import (
    collect_ranges,
    is_static,
    quantized_activations,
    static_ranges,
    with_range,
)
from ar_tuner.algorithms.base import BlockResult, BlockTask, Target, TuneSettings, as_parameter
from ar_tuner.blocks import weights_of
from ar_tuner.carry import Route
from ar_tuner.compiling import Forward, plain
from ar_tuner.errors import TunerError
from ar_tuner.fused import shared_values
from ar_tuner.memory import trim
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import Call, Frame, execute, hidden, suspended, trace_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerPlan
    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.algorithms.base import Algorithm
    from ar_tuner.blocks import Block, Discovery
    from ar_tuner.residence import Residence

Weights = dict[str, "QuantizedWeight"]


@dataclass(frozen=True)
class Job:
    """One model to quantize, all questions answered.

    Attributes:
        rows: calibration tokens [N, T]; None for algorithms that need none.
        chain_batch: rows per forward of the walk.
        quantized_inputs: blocks are tuned on what the quantized blocks before them give.
        finished: weights of blocks that an earlier, interrupted run has finished.
        report: called with (block index, step, steps, loss) while a block is tuned.
        residence: brings blocks into memory, and lets them go.
        started: called with the index of a block before work on it begins.
        forward: runs blocks in the tuning loop.
    """

    model: nn.Module
    adapter: ModelAdapter
    discovery: Discovery
    plan: LayerPlan
    algorithm: Algorithm
    settings: TuneSettings
    rows: Tensor | None
    chain_batch: int
    quantized_inputs: bool
    finished: Callable[[int], Weights | None]
    report: Callable[[int, int, int, float], None]
    residence: Residence
    started: Callable[[int], None] = lambda index: None
    forward: Forward = plain

    def targets(self, block: Block) -> tuple[Target, ...]:
        """Return the weights of a block that the plan quantizes."""
        planned = {r.layer.name: r.scheme for r in self.plan.of_block(block.name) if r.quantized}
        return tuple(Target(ref, planned[ref.layer]) for ref in weights_of(block, list(planned)))

    def route(self, index: int) -> Route:
        """Return the way of a block's arguments to its device, and of its results back."""
        placement = self.residence.placement
        return Route(placement.blocks[index], placement.home)

    def part(self, index: int) -> None:
        """Let go of a block whose weights are final and have been taken."""
        block = self.discovery.blocks[index]

        def finals() -> dict[str, Tensor]:
            weights = self.finished(index)
            return {} if weights is None else _replacements(self, block, weights)

        self.residence.settle(index, finals)
        self.residence.leave(index)
        trim()


@dataclass(frozen=True)
class BlockOutcome:
    """A finished block."""

    index: int
    name: str
    result: BlockResult
    seconds: float
    restored: bool


def quantize_blocks(job: Job) -> Iterator[BlockOutcome]:
    """Yield every block as it becomes final; its float weights are then the dequantized ones.

    Raises:
        TunerError: a block that holds planned layers is never called by the model.
    """
    if needs_inputs(job.algorithm, job.plan):
        yield from _walk(job)
        return
    for index, block in enumerate(job.discovery.blocks):
        began = time.perf_counter()
        job.residence.enter(index)
        result, restored = _quantize(job, index, None, ())
        install(block.module, _replacements(job, block, result.weights))
        yield BlockOutcome(index, block.name, result, time.perf_counter() - began, restored)
        job.part(index)


def needs_inputs(algorithm: Algorithm, plan: LayerPlan) -> bool:
    """Tell whether text has to go through the model: for tuning, or for ranges of activations."""
    return algorithm.needs_inputs or any(is_static(row.scheme) for row in plan.quantized)


def _walk(job: Job) -> Iterator[BlockOutcome]:
    assert job.rows is not None
    blocks = job.discovery.blocks
    modules = [b.module for b in blocks]
    entry = job.adapter.entry(job.model)
    chunks = list(job.rows.split(job.chain_batch))
    batches = [job.adapter.inputs(job.model, chunk) for chunk in chunks]
    order = _order(job, entry, modules)
    _check_called(job, order)
    left = Counter(order)
    chains = 2 if job.quantized_inputs else 1
    replaced: dict[int, dict[str, Tensor]] = {}
    weights: dict[int, Mapping[str, QuantizedWeight]] = {}
    with suspended(entry, modules, batches * chains) as frames:
        for position, index in enumerate(order):
            floats = [f for f in frames[: len(batches)] if _stands_at(f, index)]
            quants = [f for f in frames[len(batches) :] if _stands_at(f, index)]
            if not floats:
                continue
            job.residence.enter(index)
            route = job.route(index)
            outputs = [execute(modules[index], f.call, route) for f in floats if f.call is not None]
            left[index] -= 1
            result = None
            if index not in replaced:
                began = time.perf_counter()
                calls = [f.call for f in (quants or floats) if f.call is not None]
                references = [hidden(o) for o in outputs]
                bank = RowBank.of(calls, [r.shape[0] for r in references], device=route.there)
                result, restored = _quantize(job, index, bank, rows_of(references))
                replaced[index] = _replacements(job, blocks[index], result.weights)
                weights[index] = result.weights
                del calls, references, bank
            if position < len(order) - 1:
                _resume(floats, outputs)
                with quantized_activations(
                    modules[index], job.targets(blocks[index]), static_ranges(weights[index])
                ):
                    block = functools.partial(_replaced, modules[index], replaced[index])
                    _resume(quants, (execute(block, f.call, route) for f in quants if f.call))
            if left[index] == 0:
                install(modules[index], replaced[index])
                replaced[index], weights[index] = {}, {}
            if result is not None:
                seconds = time.perf_counter() - began
                yield BlockOutcome(index, blocks[index].name, result, seconds, restored)
            if left[index] == 0:
                job.part(index)


def _order(job: Job, entry: nn.Module, modules: list[nn.Module]) -> list[int]:
    """Return the blocks in the order one row of calibration data calls them."""
    assert job.rows is not None

    def run(call: Call) -> object:
        job.residence.enter(call.index)
        output = execute(modules[call.index], call, job.route(call.index))
        job.residence.leave(call.index)
        return output

    return trace_calls(entry, modules, job.adapter.inputs(job.model, job.rows[:1]), run=run)


def _stands_at(frame: Frame, index: int) -> bool:
    return frame.call is not None and frame.call.index == index


def _resume(frames: list[Frame], answers: Iterable[object]) -> None:
    """Answer frames one by one, so that what each was given can go before the next is answered."""
    for frame, answer in zip(frames, answers, strict=True):
        frame.resume(answer)


def _replaced(
    block: nn.Module, weights: Mapping[str, Tensor], /, *args: Any, **kwargs: Any
) -> object:
    """Return what a block gives with some of its weights replaced."""
    return plain(block, weights, args, kwargs)


def _quantize(
    job: Job, index: int, bank: RowBank | None, reference: Any
) -> tuple[BlockResult, bool]:
    block = job.discovery.blocks[index]
    targets = job.targets(block)
    saved = job.finished(index)
    if saved is not None:
        return BlockResult(saved), True
    if not targets:
        return BlockResult({}), False
    job.started(index)
    task = BlockTask(
        block=block.module,
        name=block.name,
        targets=targets,
        inputs=bank,
        reference=reference,
        settings=job.settings,
        report=lambda step, steps, loss: job.report(index, step, steps, loss),
        forward=job.forward,
    )
    _check_finite(task)
    task = dataclasses.replace(task, shared=shared_values(task))
    if bank is not None:
        task = dataclasses.replace(task, ranges=collect_ranges(task))
    result = job.algorithm.quantize(task)
    schemes = {t.ref.layer: t.scheme for t in targets}
    weights = {
        layer: with_range(weight, schemes[layer], task.ranges.get(layer))
        for layer, weight in result.weights.items()
    }
    return dataclasses.replace(result, weights=weights), False


def _replacements(
    job: Job, block: Block, weights: Mapping[str, QuantizedWeight]
) -> dict[str, Tensor]:
    return {
        t.ref.parameter: as_parameter(
            t, weights[t.ref.layer].dequantize(), block.module.get_parameter(t.ref.parameter)
        )
        for t in job.targets(block)
    }


def install(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put dequantized weights in the place of the float ones."""
    for name, value in weights.items():
        block.get_parameter(name).data = value.detach().contiguous()


def _check_called(job: Job, order: list[int]) -> None:
    called = set(order)
    missed = [
        b.name for i, b in enumerate(job.discovery.blocks) if i not in called and job.targets(b)
    ]
    if missed:
        msg = (
            f"{len(missed)} blocks are never run on text and cannot be tuned: "
            f"{', '.join(missed[:8])}. Leave them out with ignore_layers, or use recipe 'rtn'."
        )
        raise TunerError(msg)


def _check_finite(task: BlockTask) -> None:
    bad = [t.ref.layer for t in task.targets if not torch.isfinite(task.weight(t)).all()]
    if bad:
        msg = f"weights with NaN or infinite values cannot be quantized: {', '.join(bad)}"
        raise TunerError(msg)
