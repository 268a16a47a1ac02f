"""The walk over all blocks: float reference, tuning, quantized continuation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ar_tuner.activations import is_static, quantized_activations, static_ranges
from ar_tuner.algorithms.base import BlockResult, Target, TuneSettings
from ar_tuner.algorithms.importance import metered
from ar_tuner.algorithms.rtn import Rtn
from ar_tuner.blocks import list_of, weights_of
from ar_tuner.carry import Route
from ar_tuner.compiling import Forward, plain
from ar_tuner.memory import trim
from ar_tuner.orders import check_called, check_left, check_ordered, uncalled
from ar_tuner.others import interleaved, joined, samples_of
from ar_tuner.parts import WeightRef, replacements
from ar_tuner.reach import unreached_by
from ar_tuner.routed import Routed, counting
from ar_tuner.sensitivity import token_weights
from ar_tuner.spans import Material, quantize_span
from ar_tuner.walk import Call, Frame, execute, suspended, trace_calls
from ar_tuner.window import Passage, check_chained, follow, windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerPlan
    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.algorithms.base import Algorithm
    from ar_tuner.blocks import Block, Discovery
    from ar_tuner.events import Level
    from ar_tuner.others import Inputs
    from ar_tuner.residence import Residence


@dataclass(frozen=True)
class Job:
    """One model to quantize, all questions answered.

    Attributes:
        rows: calibration tokens [N, T]; None for algorithms that need none.
        others: samples of one row that hold more than tokens (images).
        chain_batch: rows per forward of the walk.
        quantized_inputs: blocks are tuned on what the quantized blocks before them give.
        finished: what became of a block that an earlier, interrupted run has finished.
        report: called with (block index, step, steps, loss) while a block is tuned.
        residence: brings blocks into memory, and lets them go.
        entered: called with the index of a block whose float weights are in memory.
        started: called with the index of a block before work on it begins.
        note: called with a level and a text that a user should know.
        routed: called with a block's index and the tokens that a list of its experts was sent.
        window: consecutive blocks that are tuned as one.
        foldable: tells of a parameter, by its name in the model, whether it belongs to one module
            and may change; scales are then folded into norms. None: nothing is folded.
        fold_weights: scales are folded for the sake of weights too, not of activations alone.
        weigh_tokens: errors count as the model's predictions depend on them.
        head: the output head, walked after the blocks as one more, if it is to be quantized.
        tail: what the model does to the head's logits.
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
    finished: Callable[[int], BlockResult | None]
    report: Callable[[int, int, int, float], None]
    residence: Residence
    entered: Callable[[int], None] = lambda index: None
    started: Callable[[int], None] = lambda index: None
    note: Callable[[Level, str], None] = lambda level, text: None
    routed: Callable[[int, Routed], None] = lambda index, found: None
    window: int = 1
    foldable: Callable[[str], bool] | None = None
    fold_weights: bool = True
    weigh_tokens: bool = False
    head: Block | None = None
    tail: Callable[[Tensor], Tensor] = lambda logits: logits
    forward: Forward = plain
    others: tuple[Inputs, ...] = ()

    def as_given(self, inputs: Inputs) -> Mapping[str, object]:
        """Return a sample's inputs as arguments of the model's forward."""
        return {**inputs, "use_cache": False}

    def batches(self) -> list[Mapping[str, object]]:
        """Return what goes through the model, one forward each: rows, among them the others."""
        assert self.rows is not None
        texts = self.rows.split(self.chain_batch) if len(self.rows) else ()
        plain = [self.adapter.inputs(self.model, rows) for rows in texts]
        parts = joined(self.others, size=self.settings.batch_size)
        return interleaved(plain, [self.as_given(part) for part in parts])

    def examples(self) -> list[Mapping[str, object]]:
        """Return one sample of every kind, the richest last."""
        assert self.rows is not None
        kinds: dict[tuple[str, ...], Inputs] = {}
        for inputs in self.others:
            known = kinds.setdefault(tuple(sorted(inputs)), inputs)
            if inputs["input_ids"].shape[1] > known["input_ids"].shape[1]:
                kinds[tuple(sorted(inputs))] = inputs
        text = [self.adapter.inputs(self.model, self.rows[:1])] if len(self.rows) else []
        return text + [self.as_given(kinds[key]) for key in sorted(kinds, key=len)]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What the walk stops at: the blocks, and after them the head."""
        return (*self.discovery.blocks, *([] if self.head is None else [self.head]))

    def targets(self, block: Block) -> tuple[Target, ...]:
        """Return the weights of a block that the plan quantizes."""
        if block is self.head:
            ref = WeightRef(block.name, "weight", transposed=False)
            return (Target(ref, self.plan[block.name].scheme),)
        planned = {r.layer.name: r.scheme for r in self.plan.of_block(block.name) if r.quantized}
        return tuple(Target(ref, planned[ref.layer]) for ref in weights_of(block, list(planned)))

    def route(self, index: int) -> Route:
        """Return the way of a block's arguments to its device, and of its results back."""
        placement = self.residence.placement
        if index == len(self.discovery.blocks):  # the head is where the model's own code is
            return Route()
        return Route(placement.blocks[index], placement.home)

    def enter(self, index: int) -> None:
        """Bring a block into memory; the head always is."""
        if index < len(self.discovery.blocks):
            self.residence.enter(index)

    def part(self, index: int) -> None:
        """Let go of a block whose weights are final and have been taken."""
        if index == len(self.discovery.blocks):
            return
        block = self.discovery.blocks[index]

        def finals() -> dict[str, Tensor]:
            result = self.finished(index)
            return {} if result is None else _finals(self, block, result)

        self.residence.settle(index, finals)
        self.residence.leave(index)
        trim()

    def visit(self, call: Call) -> object:
        """Return what a block gives; it is in memory for this call only."""
        self.enter(call.index)
        output = execute(self.blocks[call.index].module, call, self.route(call.index))
        if call.index < len(self.discovery.blocks):
            self.residence.leave(call.index)
        return output


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
    if job.foldable is not None or needs_inputs(job.algorithm, job.plan):
        yield from _walk(job)
        return
    for index in range(len(job.blocks)):
        yield _blind(job, index)
        job.part(index)


def _blind(job: Job, index: int) -> BlockOutcome:
    """Quantize a block without inputs."""
    began, block = time.perf_counter(), job.blocks[index]
    job.enter(index)
    job.entered(index)
    results, restored = quantize_span(job, (index,), None, {})
    install(block.module, _replacements(job, block, results[index].weights))
    return BlockOutcome(index, block.name, results[index], time.perf_counter() - began, restored)


def needs_inputs(algorithm: Algorithm, plan: LayerPlan) -> bool:
    """Tell whether text has to go through the model: for tuning, or for ranges of activations."""
    return algorithm.needs_inputs or any(is_static(row.scheme) for row in plan.quantized)


def wants_float_inputs(algorithm: Algorithm) -> bool:
    """Tell whether an algorithm looks at what the float model gives its blocks."""
    return bool(getattr(algorithm, "float_inputs", False))


def _walk(job: Job) -> Iterator[BlockOutcome]:
    assert job.rows is not None
    blocks = job.blocks
    modules = [b.module for b in blocks]
    entry = job.adapter.entry(job.model)
    batches = job.batches()
    samples = [samples_of(batch) for batch in batches]
    spans = _spans(job, entry, modules)
    left = Counter(index for span in spans for index in span)
    done: dict[int, BlockResult] = {}
    replaced: dict[int, dict[str, Tensor]] = {}
    errors: dict[str, list[float]] = {}
    weights = token_weights(job) if job.weigh_tokens else None
    with suspended(entry, modules, batches * (2 if job.quantized_inputs else 1)) as frames:
        for position, span in enumerate(spans):
            check_left(job, frames, left)
            here = [i for i, f in enumerate(frames[: len(batches)]) if _stands_at(f, span[0])]
            floats = [frames[i] for i in here]
            quants = [f for f in frames[len(batches) :] if _stands_at(f, span[0])]
            if not floats:
                continue
            began, fresh, restored = time.perf_counter(), span[0] not in done, False
            for index in span:
                job.enter(index)
            with _counting(job, span) as routed:
                passages, energy = _float_pass(job, span, floats)
            if fresh:
                for index in span:
                    job.entered(index)
                    for found in routed[index]:
                        job.routed(index, found)
                firsts = [f.call for f in quants or floats if f.call is not None]
                counted = None if weights is None else weights[min(span[-1], len(weights) - 1)]
                material = Material(firsts, passages, energy, counted, [samples[i] for i in here])
                results, restored = quantize_span(job, span, material, errors)
                del firsts, material
                for index in span:  # folded, where it is to be
                    job.entered(index)
                for index, result in results.items():
                    replaced[index] = _replacements(job, blocks[index], result.weights)
                done |= results
            outputs = [passage.output for passage in passages]
            del passages
            if position < len(spans) - 1:
                _resume(floats, outputs)
                _pass_on(job, span, quants, done, replaced)
            del outputs
            seconds = (time.perf_counter() - began) / len(span)
            for index in span:
                left[index] -= 1
                result, name = done[index], blocks[index].name
                if left[index] == 0:
                    install(modules[index], replaced[index])
                    done[index], replaced[index] = BlockResult({}), {}
                if fresh:
                    yield BlockOutcome(index, name, result, seconds, restored)
                if left[index] == 0:
                    job.part(index)
    yield from _missed(job, left)


def _missed(job: Job, left: Mapping[int, int]) -> Iterator[BlockOutcome]:
    """Round the blocks that no sample came by."""
    for index in uncalled(job, left):
        text = f"no sample comes by {job.blocks[index].name}, so it is rounded to nearest"
        job.note("warning", text)
        yield _blind(dataclasses.replace(job, algorithm=Rtn()), index)
        job.part(index)


def _spans(job: Job, entry: nn.Module, modules: Sequence[nn.Module]) -> list[tuple[int, ...]]:
    """Return the blocks in the windows they are tuned in, as one forward calls them."""
    examples = job.examples()
    judge = getattr(job.adapter, "check_reached", None)
    if judge is not None and not job.others:
        judge(unreached_by(job, examples[0]), job.note)
    orders = [trace_calls(entry, modules, example, run=job.visit) for example in examples]
    order = orders[-1]
    check_ordered(job, orders)
    check_called(job, order)
    lists = [f"{list_of(b.name)} {job.route(i).there}" for i, b in enumerate(job.blocks)]
    spans = windows(order, lists, job.window)
    check_chained(entry, modules, spans, examples[-1], run=job.visit)
    return spans


def _stands_at(frame: Frame, index: int) -> bool:
    return frame.call is not None and frame.call.index == index


def _float_pass(
    job: Job, span: tuple[int, ...], frames: list[Frame]
) -> tuple[list[Passage], Mapping[str, Tensor]]:
    """Lead the float frames through a window; return their ways and the energy of the inputs.

    The head is not run: its output would not fit.
    """
    modules = [b.module for b in job.blocks]
    block = job.blocks[span[0]]
    if block is job.head:
        return [Passage((f.call,), None, ()) for f in frames if f.call is not None], {}
    metering = wants_float_inputs(job.algorithm) and len(span) == 1
    with metered(block.module, job.targets(block) if metering else ()) as energy:
        passages = [follow(modules, span, frame, job.route(span[0])) for frame in frames]
    return passages, energy.means()


@contextlib.contextmanager
def _counting(job: Job, span: tuple[int, ...]) -> Iterator[dict[int, list[Routed]]]:
    """Yield, by block, what will tell the tokens of its experts once the context is left."""
    with contextlib.ExitStack() as stack:
        yield {
            index: stack.enter_context(
                counting(job.blocks[index].module, job.targets(job.blocks[index]))
            )
            for index in span
        }


def _pass_on(
    job: Job,
    span: tuple[int, ...],
    frames: list[Frame],
    results: Mapping[int, BlockResult],
    replaced: Mapping[int, Mapping[str, Tensor]],
) -> None:
    """Lead the quantized frames through a window and on to the next one."""
    for index in span:
        block = job.blocks[index]
        ranges = static_ranges(results[index].weights)
        with quantized_activations(block.module, job.targets(block), ranges):
            run = functools.partial(_replaced, block.module, replaced[index])
            calls = (f.call for f in frames if f.call is not None)
            _resume(frames, (execute(run, call, job.route(index)) for call in calls))


def _resume(frames: list[Frame], answers: Iterable[object]) -> None:
    """Answer frames one by one, so that what each was given can go before the next is answered."""
    for frame, answer in zip(frames, answers, strict=True):
        frame.resume(answer)


def _replaced(
    block: nn.Module, weights: Mapping[str, Tensor], /, *args: Any, **kwargs: Any
) -> object:
    """Return what a block gives with some of its weights replaced."""
    return plain(block, weights, args, kwargs)


def _replacements(
    job: Job, block: Block, weights: Mapping[str, QuantizedWeight]
) -> dict[str, Tensor]:
    return replacements(block.module, [t.ref for t in job.targets(block)], weights)


def _finals(job: Job, block: Block, result: BlockResult) -> dict[str, Tensor]:
    """Return every parameter of a block that is not as the source has it, by name."""
    gains = {} if result.folding is None else result.folding.tensors
    return {**_replacements(job, block, result.weights), **gains}


def install(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put dequantized weights in the place of the float ones."""
    for name, value in weights.items():
        block.get_parameter(name).data = value.detach().contiguous()
