"""One quantization from start to end: walk, run directory, sink."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ar_tuner import events
from ar_tuner.blocks import Block, weight_of
from ar_tuner.determinism import deterministic
from ar_tuner.errors import TunerError
from ar_tuner.exact import weight_finder
from ar_tuner.folding.store import foldable, folds, gains_of, keep_block, loader
from ar_tuner.leftovers import (
    install_outside,
    keep_choice,
    kept,
    source_names,
    staying,
    unreached,
    untouched,
)
from ar_tuner.logits import tail_of
from ar_tuner.others import fitted
from ar_tuner.pipeline import Job, needs_inputs, quantize_blocks, wants_float_inputs
from ar_tuner.progress import Eta, peak_bytes
from ar_tuner.refine import (
    Others,
    Refinement,
    copy_floats,
    fit,
    gathered,
    install_refined,
    norm_gains,
    refine,
)
from ar_tuner.registry import open_sink, stage
from ar_tuner.requests import run_settings, sink_request
from ar_tuner.residence import on_call
from ar_tuner.rows import none_left, rows_per_frame
from ar_tuner.run import Run, fingerprint
from ar_tuner.sink import Sinks, folders
from ar_tuner.stages import ModelResult
from ar_tuner.written import Written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from torch import nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerPlan
    from ar_tuner.algorithms.base import BlockResult
    from ar_tuner.api import AutoRound, Prepared
    from ar_tuner.refine import Rows
    from ar_tuner.routed import Routed

Weights = dict[str, "QuantizedWeight"]


def quantize_in_memory(request: AutoRound, prepared: Prepared) -> None:
    """Quantize the model in place, without a run directory."""
    began = time.perf_counter()
    rows = _rows(request, prepared)
    job = _job(request, prepared, finished=lambda _: None, rows=rows)
    outside = dict(unreached(prepared, job))
    refinement = _refinement(request, prepared, job, rows, outside)
    weights: Weights = {}
    with deterministic(enabled=request.settings.enable_deterministic_algorithms):
        for _, _, result in _narrated(request, job, refinement, resumed=0, run_dir=""):
            weights |= result.weights if refinement is not None else {}
        for name, weight in outside.items():
            install_outside(prepared.model, name, weight)
        if refinement is not None:
            with gathered(job):
                refined = refine(job, refinement, weights, emit=request.emit)
                install_refined(job, refined.weights, refined.tensors)
    request.emit(
        events.RunFinished(
            "", time.perf_counter() - began, peak_bytes(), prepared.plan.bits_per_weight
        )
    )


def quantize_to_directory(
    request: AutoRound,
    output: Path,
    formats: Sequence[str],
    check: Callable[[Path, Callable[[str], QuantizedWeight], nn.Module], None] | None,
) -> Written:
    """Quantize and write a checkpoint; see `AutoRound.quantize_and_save`."""
    began = time.perf_counter()
    plan = request.draft()
    _open_sinks(request, plan, output, formats, None).abort()  # refuse before work
    prepared = request.prepare()
    sink = _open_sinks(request, prepared.plan, output, formats, prepared)
    run_dir = Path(request.settings.run_dir or output.with_name(f"{output.name}.run"))
    try:
        rows = _rows(request, prepared)
        settings = run_settings(request, ",".join(formats))
        run = Run.open(
            run_dir,
            settings,
            fingerprint(
                settings,
                prepared.plan,
                None if rows is None else rows.all,
                request.source,
                prepared.model,
            ),
            resume=request.settings.resume,
        )
        with run:
            keep_choice(request, run.directory)
            home = _home(prepared)
            job = _job(request, prepared, finished=loader(run, home), rows=rows)
            outside = dict(unreached(prepared, job))
            with deterministic(enabled=request.settings.enable_deterministic_algorithms):
                refinement = _refinement(request, prepared, job, rows, outside)
                _write(request, prepared, job, run, sink, outside, refinement)
            written = sink.commit()
            final = written[0] if len(written) == 1 else output
            if check is not None:
                find = weight_finder(request, prepared, job, run, outside)
                with on_call(prepared.residence, [b.module for b in prepared.discovery.blocks]):
                    for path in written:
                        check(path, find, prepared.model)
            event = events.RunFinished(
                str(final), time.perf_counter() - began, peak_bytes(), prepared.plan.bits_per_weight
            )
            run.record(event)
            run.finish(final, keep_blocks=not prepared.residence.keep)
            request.emit(event)
    except BaseException:
        sink.abort()
        raise
    made = Written(final, prepared.model, prepared.residence, run.drop_blocks)
    if prepared.residence.keep:
        made.bring_back()
    return made


def _open_sinks(
    request: AutoRound,
    plan: LayerPlan,
    output: Path,
    formats: Sequence[str],
    prepared: Prepared | None,
) -> Sinks:
    opened: list[Any] = []
    try:
        for name, folder in folders(output, formats).items():
            opened.append(open_sink(sink_request(request, plan, folder, name, prepared)))
    except BaseException:
        Sinks(opened).abort()
        raise
    return Sinks(opened)


def _write(  # noqa: PLR0913
    request: AutoRound,
    prepared: Prepared,
    job: Job,
    run: Run,
    sink: Sinks,
    outside: Weights,
    refinement: Refinement | None,
) -> None:
    names = source_names(request, prepared)
    written: set[str] = set()
    folded: dict[str, torch.Tensor] = {}

    def put(layer: str, weight: QuantizedWeight) -> None:
        key = names[f"{layer}.weight"]
        sink.put(key.removesuffix(".weight"), weight)
        written.add(key)

    for index, name, result in _narrated(
        request, job, refinement, resumed=_done(job, run), run_dir=str(run.directory), run=run
    ):
        if index not in run.finished:
            keep_block(run, index, name, result)
        if refinement is None:
            for layer, weight in result.weights.items():
                put(layer, weight)
        folded |= gains_of(name, result)
    for layer, weight in outside.items():
        install_outside(prepared.model, layer, weight)
        put(layer, weight)
    moved: Mapping[str, torch.Tensor] = {}
    if refinement is not None:
        with gathered(job):
            refined = _refined(request, job, run, refinement)
        for layer, weight in refined.weights.items():
            put(layer, weight)
        moved = refined.tensors
    for name, tensor in {**folded, **moved}.items():
        sink.put_tensor(names[name], tensor.cpu())
        written.add(names[name])
    for layer, read in kept(request, prepared).items():
        sink.put(layer, read())
        written.add(f"{layer}.weight")
    for key, tensor in untouched(request, prepared, written):
        sink.put_tensor(key, tensor)


def _done(job: Job, run: Run) -> int:
    """Return how many blocks an earlier run has finished; a stage is none."""
    return sum(1 for index in run.finished if index < len(job.blocks))


def _rows(request: AutoRound, prepared: Prepared) -> Rows | None:
    staged = request.settings.chosen.stage is not None
    wanted = staged or request.settings.fold
    if not wanted and not needs_inputs(request.algorithm(), prepared.plan):
        return None
    return request.calibration_rows(prepared.tokenizer, prepared.model)


def _refinement(
    request: AutoRound, prepared: Prepared, job: Job, rows: Rows | None, outside: Weights
) -> Refinement | None:
    """Return the stage that is to follow the walk, or None; blocks then stay in memory."""
    name = request.settings.chosen.stage
    if name is None or rows is None or rows.stage is None or rows.held_out is None:
        return None
    modules = {layer: prepared.model.get_submodule(layer) for layer in outside}
    chosen, recipe = stage(name), request.settings.chosen
    may = getattr(chosen, "may_be_flat", False)
    fitting = fit(prepared.plan, job, flat=recipe.flat, may_be_flat=may)
    if fitting.refusal is not None:
        request.emit(events.Note("warning", f"{name} is left out: {fitting.refusal}"))
        return None
    if fitting.reason is not None:
        request.emit(events.Note("warning", f"{name} leaves codes as they are: {fitting.reason}"))
    prepared.residence.keep = True
    names = source_names(request, prepared)
    schemes = [row.scheme for row in prepared.plan.quantized]
    bits = min((s.weight.bits for s in schemes if s.weight is not None), default=8)
    activations = any(s.activation is not None for s in schemes)
    numbers = recipe.stage_settings(request.settings.seed, bits=bits, activations=activations)
    return Refinement(
        stage=chosen,
        settings=fitting.apply(numbers),
        rows=rows.stage,
        held_out=rows.held_out,
        others=Others(
            stage=fitted(rows.others.stage, prepared.model, _home(prepared)),
            held_out=fitted(rows.others.held_out, prepared.model, _home(prepared)),
        ),
        floats={f"{k}.weight": weight_of(m).clone() for k, m in modules.items()},
        gains=tuple(n for n in norm_gains(prepared.model) if n in names),
    )


def _refined(request: AutoRound, job: Job, run: Run, refinement: Refinement) -> ModelResult:
    """Return the result of the stage: an earlier run's, or made and kept now; installed."""
    index, name = len(job.blocks), refinement.stage.name

    def emit(event: events.RunEvent) -> None:
        run.record(event)
        request.emit(event)

    if index not in run.finished:
        weights: Weights = {}
        for i in range(index):
            weights |= run.load_block(i)[0] if i in run.finished else {}
        made = refine(job, refinement, weights, emit=emit, run=run)
        run.put_state(f"{name}-tensors", made.tensors, refinement.settings.steps)
        facts = {"loss_before": made.loss_before, "loss_after": made.loss_after}
        run.save_block(index, name, {**weights, **made.weights}, facts)
    saved = run.get_state(f"{name}-tensors")
    result = ModelResult(run.load_block(index)[0], {} if saved is None else saved[0])
    install_refined(job, result.weights, result.tensors)
    return result


def _narrated(
    request: AutoRound,
    job: Job,
    refinement: Refinement | None,
    *,
    resumed: int,
    run_dir: str,
    run: Run | None = None,
) -> Iterator[tuple[int, str, BlockResult]]:
    """Yield (index, name, result) of every block, telling listeners how it goes.

    A stage that is to follow gets a copy of the float weights of each block.
    """
    if refinement is not None:
        floats = refinement.floats
        job = dataclasses.replace(job, entered=lambda i: floats.update(copy_floats(job, i)))

    def emit(event: events.RunEvent) -> None:
        if run is not None:
            run.record(event)
        request.emit(event)

    total = len(job.blocks)
    facts = request.settings.facts()
    emit(events.RunStarted(run_dir, total, len(job.plan.quantized), facts, resumed))
    for note in staying(job.plan, request.settings):
        emit(note)
    eta = Eta(total)
    for outcome in quantize_blocks(_telling(job, emit)):
        if outcome.restored:
            eta.skip()
        else:
            eta.done()
        result = outcome.result
        emit(
            events.BlockDone(
                outcome.index,
                total,
                outcome.name,
                result.loss_before,
                result.loss_after,
                outcome.seconds,
                peak_bytes(),
                eta.seconds_left(),
            )
        )
        yield outcome.index, outcome.name, result


def _telling(job: Job, emit: Callable[[events.RunEvent], None]) -> Job:
    """Return a job that tells what happens in its blocks."""
    blocks, total = job.blocks, len(job.blocks)

    def routed(index: int, found: Routed) -> None:
        emit(events.ExpertTokens(index, found.experts, found.tokens))
        if found.remark is not None:
            emit(events.Note(*found.remark))

    return dataclasses.replace(
        job,
        report=lambda i, step, steps, loss: emit(
            events.BlockProgress(i, total, blocks[i].name, step, steps, loss)
        ),
        started=lambda i: emit(events.BlockStarted(i, total, blocks[i].name)),
        note=lambda level, text: emit(events.Note(level, text)),
        routed=routed,
    )


def _job(
    request: AutoRound,
    prepared: Prepared,
    *,
    finished: Callable[[int], BlockResult | None],
    rows: Rows | None,
) -> Job:
    recipe = request.settings.chosen
    chosen = request.algorithm()
    tuned, held = recipe.iters > 0, request.settings.validation_rows
    if rows is not None and held >= rows.count:
        raise TunerError(none_left(held, rows.count))
    chained = request.settings.enable_quanted_input and not wants_float_inputs(chosen)
    return Job(
        model=prepared.model,
        adapter=prepared.adapter,
        discovery=prepared.discovery,
        plan=prepared.plan,
        algorithm=chosen,
        settings=request.settings.tuning(),
        rows=None if rows is None else rows.walk.to(_home(prepared)),
        chain_batch=recipe.batch_size
        if rows is None
        else rows_per_frame(recipe.batch_size, *rows.walk.shape),
        quantized_inputs=chained,
        finished=finished,
        report=lambda index, step, steps, loss: None,
        residence=prepared.residence,
        window=request.settings.nblocks if tuned else 1,
        foldable=foldable(prepared.model, source_names(request, prepared))
        if folds(request.settings, prepared.plan)
        else None,
        fold_weights=bool(request.settings.fold),
        weigh_tokens=request.settings.token_weights,
        head=_head(prepared) if rows is not None else None,
        tail=tail_of(getattr(prepared.model, "config", None)),
        forward=request.forward(),
        others=() if rows is None else fitted(rows.others.walk, prepared.model, _home(prepared)),
    )


def _head(prepared: Prepared) -> Block | None:
    """Return the output head as a block of its own if it is to be quantized."""
    heads = (r for r in prepared.plan.of_block(None) if r.quantized and r.layer.role == "lm_head")
    name = next((row.layer.name for row in heads), None)
    return None if name is None else Block(name, prepared.model.get_submodule(name))


def _home(prepared: Prepared) -> Any:
    found = prepared.residence.placement.home
    return next(prepared.model.parameters()).device if found is None else found
