"""One quantization from start to end: walk, run directory, sink."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ar_tuner import events
from ar_tuner.algorithms.base import BlockResult, Target
from ar_tuner.algorithms.rtn import nearest
from ar_tuner.blocks import Block, WeightRef, is_linear, weight_of
from ar_tuner.determinism import deterministic
from ar_tuner.errors import TunerError
from ar_tuner.logits import tail_of
from ar_tuner.names import map_names, source_files, source_tensors
from ar_tuner.pipeline import Job, install, needs_inputs, quantize_blocks, wants_float_inputs
from ar_tuner.progress import Eta, peak_bytes
from ar_tuner.refine import Refinement, copy_floats, install_refined, refine, refusal
from ar_tuner.registry import open_sink, stage
from ar_tuner.rows import none_left
from ar_tuner.run import Run, fingerprint
from ar_tuner.sink import SinkRequest, Sinks, folders
from ar_tuner.stages import ModelResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerPlan
    from ar_tuner.api import AutoRound, Prepared
    from ar_tuner.refine import Rows

Weights = dict[str, "QuantizedWeight"]


def quantize_in_memory(request: AutoRound, prepared: Prepared) -> None:
    """Quantize the model in place, without a run directory."""
    began = time.perf_counter()
    rows = _rows(request, prepared)
    job = _job(request, prepared, finished=lambda _: None, rows=rows)
    outside = dict(_outside(prepared, job))
    refinement = _refinement(request, prepared, job, rows, outside)
    weights: Weights = {}
    with deterministic(enabled=request.settings.enable_deterministic_algorithms):
        for _, _, result in _narrated(request, job, resumed=0, run_dir=""):
            weights |= result.weights if refinement is not None else {}
        for name, weight in outside.items():
            _install_outside(prepared.model, name, weight)
        if refinement is not None:
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
) -> tuple[nn.Module, Path]:
    """Quantize and write a checkpoint; see `AutoRound.quantize_and_save`."""
    began = time.perf_counter()
    plan = request.draft()
    _open_sinks(request, plan, output, formats, None).abort()  # refuse before work
    prepared = request.prepare()
    sink = _open_sinks(request, prepared.plan, output, formats, prepared)
    run_dir = Path(request.settings.run_dir or output.with_name(f"{output.name}.run"))
    try:
        rows = _rows(request, prepared)
        settings = _run_settings(request, ",".join(formats))
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
            request.keep_choice(run.directory)
            job = _job(request, prepared, finished=_loader(run), rows=rows)
            outside = dict(_outside(prepared, job))
            with deterministic(enabled=request.settings.enable_deterministic_algorithms):
                refinement = _refinement(request, prepared, job, rows, outside)
                _write(request, prepared, job, run, sink, outside, refinement)
            written = sink.commit()
            final = written[0] if len(written) == 1 else output
            if check is not None:
                for path in written:
                    find = _weight_finder(request, prepared, job, run, outside)
                    check(path, find, prepared.model)
            event = events.RunFinished(
                str(final), time.perf_counter() - began, peak_bytes(), prepared.plan.bits_per_weight
            )
            run.record(event)
            run.finish(final)
            request.emit(event)
    except BaseException:
        sink.abort()
        raise
    return prepared.model, final


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
            opened.append(open_sink(_sink_request(request, plan, folder, name, prepared)))
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
    names = _source_names(request, prepared)
    written: set[str] = set()

    def put(layer: str, weight: QuantizedWeight) -> None:
        key = names[f"{layer}.weight"]
        sink.put(key.removesuffix(".weight"), weight)
        written.add(key)

    for index, name, result in _narrated(
        request, job, resumed=len(run.finished), run_dir=str(run.directory), run=run
    ):
        if index not in run.finished:
            run.save_block(index, name, result.weights, result.facts())
        if refinement is None:
            for layer, weight in result.weights.items():
                put(layer, weight)
    for layer, weight in outside.items():
        _install_outside(prepared.model, layer, weight)
        put(layer, weight)
    if refinement is not None:
        refined = _refined(request, job, run, refinement)
        for layer, weight in refined.weights.items():
            put(layer, weight)
        for name, tensor in refined.tensors.items():
            sink.put_tensor(names[name], tensor.cpu())
            written.add(names[name])
    for key, tensor in _untouched(request, prepared, written):
        sink.put_tensor(key, tensor)


def _rows(request: AutoRound, prepared: Prepared) -> Rows | None:
    if not needs_inputs(request.algorithm(), prepared.plan):
        return None
    return request.calibration_rows(prepared.tokenizer, prepared.model)


def _refinement(
    request: AutoRound, prepared: Prepared, job: Job, rows: Rows | None, outside: Weights
) -> Refinement | None:
    """Return the stage that is to follow the walk, or None; copies the float weights for it."""
    name = request.settings.chosen.stage
    if name is None or rows is None or rows.stage is None or rows.held_out is None:
        return None
    modules = {layer: prepared.model.get_submodule(layer) for layer in outside}
    why = refusal(prepared.model, prepared.plan, job)
    if why is not None:
        request.emit(events.Note("warning", f"{name} is left out: {why}"))
        return None
    home = _device(prepared.model)
    return Refinement(
        stage=stage(name),
        settings=request.settings.chosen.stage_settings(request.settings.seed),
        rows=rows.stage.to(home),
        held_out=rows.held_out.to(home),
        floats=copy_floats(job, modules),
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
    request: AutoRound, job: Job, *, resumed: int, run_dir: str, run: Run | None = None
) -> Iterator[tuple[int, str, BlockResult]]:
    """Yield (index, name, result) of every block, telling listeners how it goes."""

    def emit(event: events.RunEvent) -> None:
        if run is not None:
            run.record(event)
        request.emit(event)

    blocks = job.blocks
    total = len(blocks)
    emit(
        events.RunStarted(
            run_dir, total, len(job.plan.quantized), request.settings.facts(), resumed
        )
    )
    for row in job.plan.fallbacks:
        emit(events.Note("info", f"{row.layer.name} stays in 16 bit: {row.reason}"))
    job = dataclasses.replace(
        job,
        report=lambda i, step, steps, loss: emit(
            events.BlockProgress(i, total, blocks[i].name, step, steps, loss)
        ),
        started=lambda i: emit(events.BlockStarted(i, total, blocks[i].name)),
        note=lambda level, text: emit(events.Note(level, text)),
    )
    eta = Eta(total)
    for outcome in quantize_blocks(job):
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
    if rows is not None and held >= len(rows.walk):
        raise TunerError(none_left(held, len(rows.walk)))
    chained = request.settings.enable_quanted_input and not wants_float_inputs(chosen)
    return Job(
        model=prepared.model,
        adapter=prepared.adapter,
        discovery=prepared.discovery,
        plan=prepared.plan,
        algorithm=chosen,
        settings=request.settings.tuning(),
        rows=None if rows is None else rows.walk.to(_device(prepared.model)),
        chain_batch=recipe.batch_size,
        quantized_inputs=chained,
        finished=finished,
        report=lambda index, step, steps, loss: None,
        window=request.settings.nblocks if tuned else 1,
        head=_head(prepared) if rows is not None else None,
        tail=tail_of(getattr(prepared.model, "config", None)),
    )


def _head(prepared: Prepared) -> Block | None:
    """Return the output head as a block of its own if it is to be quantized."""
    heads = (r for r in prepared.plan.of_block(None) if r.quantized and r.layer.role == "lm_head")
    name = next((row.layer.name for row in heads), None)
    return None if name is None else Block(name, prepared.model.get_submodule(name))


def _device(model: nn.Module) -> Any:
    return next(model.parameters()).device


def _loader(run: Run) -> Callable[[int], BlockResult | None]:
    def load(index: int) -> BlockResult | None:
        if index not in run.finished:
            return None
        return BlockResult.restored(*run.load_block(index))

    return load


def _weight_finder(
    request: AutoRound, prepared: Prepared, job: Job, run: Run, outside: Weights
) -> Callable[[str], QuantizedWeight]:
    """Return a function from a layer's name in the files to its exact weight."""
    names = {
        source.removesuffix(".weight"): model.removesuffix(".weight")
        for model, source in _source_names(request, prepared).items()
    }
    index_of = {b.name: i for i, b in enumerate(job.blocks)}

    def find(layer: str) -> QuantizedWeight:
        layer = names.get(layer, layer)
        if layer in outside:
            return outside[layer]
        if len(job.blocks) in run.finished:
            return run.load_block(len(job.blocks))[0][layer]
        block = prepared.plan[layer].layer.block
        return run.load_block(index_of[layer if block is None else block])[0][layer]

    return find


def _outside(prepared: Prepared, job: Job) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield quantized layers that the walk does not reach (the embedding), rounded to nearest."""
    walked = None if job.head is None else job.head.name
    for row in prepared.plan.of_block(None):
        if row.quantized and row.layer.name != walked:
            module = prepared.model.get_submodule(row.layer.name)
            ref = WeightRef(row.layer.name, "weight", transposed=False)
            if not is_linear(module) and row.layer.role != "embedding":
                msg = f"{row.layer.name}: only linear layers and embeddings can be quantized here"
                raise TunerError(msg)
            yield row.layer.name, nearest(Target(ref, row.scheme), weight_of(module))


def _install_outside(model: nn.Module, name: str, weight: QuantizedWeight) -> None:
    module = model.get_submodule(name)
    install(module, {"weight": weight.dequantize().to(weight_of(module).dtype)})


def _source_names(request: AutoRound, prepared: Prepared) -> dict[str, str]:
    keys = list(prepared.model.state_dict())
    if request.source is None:
        return {k: k for k in keys}
    found = map_names(keys, source_files(request.source))
    lost = [r.layer.name for r in prepared.plan.quantized if f"{r.layer.name}.weight" not in found]
    if lost:
        msg = (
            f"{len(lost)} layers have no tensor of their own in {request.source}, so their "
            f"quantized weights could not be named: {', '.join(lost[:6])}"
        )
        raise TunerError(msg)
    return found


def _untouched(
    request: AutoRound, prepared: Prepared, written: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that stay as they are, one at a time; a tied head is left out."""
    tied = {f"{r.layer.name}.weight" for r in prepared.plan.rows if r.layer.tied}
    if request.source is not None:
        files = source_files(request.source)
        keys = [k for k in files if k not in written and k not in tied]
        yield from source_tensors(files, keys)
        return
    for key, tensor in prepared.model.state_dict().items():
        if key not in written and key not in tied:
            yield key, tensor.detach().cpu()


def _run_settings(request: AutoRound, format: str) -> dict[str, Any]:  # noqa: A002
    plain = dataclasses.asdict(request.settings)
    for name in ("run_dir", "resume", "overwrite", "allow_download"):
        plain.pop(name)
    plain |= {"scheme": request.scheme.name, "format": format}
    return json.loads(json.dumps(plain, default=str))


def _sink_request(
    request: AutoRound,
    plan: LayerPlan,
    output: Path,
    format: str,  # noqa: A002
    prepared: Prepared | None,
) -> SinkRequest:
    config: dict[str, Any] = {}
    if request.source is not None:
        config = json.loads((request.source / "config.json").read_text(encoding="utf-8"))
    elif request.given is not None:
        described: Any = request.given.config
        config = json.loads(json.dumps(described.to_dict(), default=str))
        config["architectures"] = [type(request.given).__name__]
    return SinkRequest(
        format=format,
        output=output,
        source=request.source,
        config=config,
        plan=plan,
        blocks=_block_lists(plan),
        facts=request.settings.facts(),
        max_shard_bytes=request.settings.shard_bytes,
        side=None if request.source is not None or prepared is None else _side(prepared),
        overwrite=request.settings.overwrite,
    )


def _block_lists(plan: LayerPlan) -> tuple[str, ...]:
    # layers that are not in the model have blocks of their own, which are no block lists
    quantized = {r.layer.block for r in plan.quantized}
    blocks = (b for r in plan.rows if (b := r.layer.block) is not None and b in quantized)
    return tuple(dict.fromkeys(b.rpartition(".")[0] for b in blocks))


def _side(prepared: Prepared) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        if prepared.tokenizer is not None and hasattr(prepared.tokenizer, "save_pretrained"):
            prepared.tokenizer.save_pretrained(folder)
        generation = getattr(prepared.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)

    return write
