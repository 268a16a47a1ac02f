"""One window of blocks (most hold one) from what its frames hold to its quantized weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_tuner.activations import collect_ranges, with_range
from ar_tuner.algorithms.base import BlockResult, BlockTask, Target
from ar_tuner.algorithms.block_tuning import Tuned
from ar_tuner.algorithms.head import head_ranges, state_of
from ar_tuner.algorithms.rtn import nearest_of
from ar_tuner.blocks import list_of
from ar_tuner.errors import TunerError
from ar_tuner.folding import Folding, apply, fold
from ar_tuner.fused import shared_values
from ar_tuner.guard import guarded
from ar_tuner.reach import remark, unreached
from ar_tuner.rows import RowBank, rows_of
from ar_tuner.walk import hidden
from ar_tuner.window import Window, joint_call, shifted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_tuner.pipeline import Job
    from ar_tuner.walk import Call
    from ar_tuner.window import Passage, Place


@dataclass(frozen=True)
class Material:
    """What the frames hold for a window.

    Attributes:
        firsts: the calls of its first block.
        passages: the float passages.
        energy: see `BlockTask.energy`.
        token_weights: of the output of its last block [N, T]; None: tokens count alike.
        samples: how many each frame holds; None: as many as its output has rows.
    """

    firsts: list[Call]
    passages: list[Passage]
    energy: Mapping[str, Tensor]
    token_weights: Tensor | None = None
    samples: Sequence[int] | None = None


def quantize_span(
    job: Job, span: tuple[int, ...], material: Material | None, known: dict[str, list[float]]
) -> tuple[dict[int, BlockResult], bool]:
    """Return what becomes of the blocks of a window, and whether an earlier run has done it.

    `known`: relative errors of earlier blocks by the list they are in, which grows: the layers of
    a tower are no measure for those of a decoder.
    """
    errors = known.setdefault(list_of(job.blocks[span[0]].name), [])
    saved = [job.finished(index) for index in span]
    restored = [r for r in saved if r is not None]
    if len(restored) == len(span):
        errors.extend(r.relative for r in restored[:1] if r.relative is not None)
        for index, made in zip(span, restored, strict=True):
            if made.folding is not None:
                apply(job.blocks[index].module, job.targets(job.blocks[index]), made.folding)
        return dict(zip(span, restored, strict=True)), True
    targets = {index: job.targets(job.blocks[index]) for index in span}
    if not any(targets.values()):
        return {index: BlockResult({}) for index in span}, False
    for index in span:
        job.started(index)
    task = _task(job, targets, material)
    _check_finite(task)
    is_head = job.blocks[span[0]] is job.head
    task, folding = (task, Folding()) if is_head else _fold(job, task)
    task = dataclasses.replace(task, shared=shared_values(task))
    if material is not None:
        task = dataclasses.replace(
            task, ranges=head_ranges(task) if is_head else collect_ranges(task)
        )
        if not is_head:
            _tell_unreached(job, task)
    algorithm, steps = job.algorithm, task.settings.block_steps
    algorithm = Tuned(algorithm, steps) if steps and material is not None else algorithm
    result = _head(job, task) if is_head else guarded(algorithm, task, errors, job.note)
    errors.extend([] if result.relative is None else [result.relative])
    result = dataclasses.replace(result, folding=folding or None)
    return {index: _part(result, targets[index], task.ranges) for index in span}, False


def _fold(job: Job, task: BlockTask) -> tuple[BlockTask, Folding]:
    """Fold scales into the norms of the task's block, and return what the task is then."""
    if job.foldable is None or task.inputs is None:
        return task, Folding()
    allowed, name = job.foldable, task.name
    folding = fold(
        task,
        allowed=lambda parameter: allowed(f"{name}.{parameter}"),
        weights=job.fold_weights,
    )
    apply(task.block, task.targets, folding)
    energy = {
        t.ref.layer: task.energy[t.ref.layer] / folding.square(t.ref)
        for t in task.targets
        if t.ref.layer in task.energy
    }
    return dataclasses.replace(task, energy=energy), folding


def _task(
    job: Job, targets: Mapping[int, Sequence[Target]], material: Material | None
) -> BlockTask:
    first, name = next(iter(targets)), job.blocks[next(iter(targets))].name
    single = len(targets) == 1
    bank: RowBank | None = None
    floats: RowBank | None = None
    reference: Sequence[Tensor] = ()
    places: tuple[Place, ...] = ()
    if material is not None:
        head = job.blocks[first] is job.head
        device = job.route(first).there
        bank, reference = _rows(material, material.firsts, device, head=head)
        befores = [p.calls[0] for p in material.passages]
        floats, _ = _rows(material, befores, device, head=head)
        places = material.passages[0].places
    modules = [job.blocks[index].module for index in targets]
    return BlockTask(
        block=modules[0] if single else Window(modules, places).eval(),
        name=name if single else f"{name} to {job.blocks[max(targets)].name}",
        targets=tuple(targets[first]) if single else shifted(targets),
        inputs=bank,
        float_inputs=floats,
        reference=reference,
        settings=job.settings,
        report=lambda step, steps, loss: job.report(first, step, steps, loss),
        energy={} if material is None else material.energy,
        tail=job.tail,
        forward=job.forward,
        token_weights=None
        if material is None or material.token_weights is None
        else tuple(material.token_weights),
        note=lambda text: job.note("info", text),
    )


def _rows(
    material: Material, calls: list[Call], device: torch.device | None, *, head: bool
) -> tuple[RowBank, list[Tensor]]:
    """Return what a window is given and should give, by row; for the head its float inputs."""
    outputs = [
        state_of(p.calls[0].args, p.calls[0].kwargs) if head else hidden(p.output)
        for p in material.passages
    ]
    if material.passages[0].places:
        pairs = zip(material.passages, calls, strict=True)
        calls = [joint_call(passage, first) for passage, first in pairs]
    counts = [o.shape[0] for o in outputs]
    samples = counts if material.samples is None else material.samples
    # where an output has no row for each sample (patches of all images), all of it is one row
    sizes = [n if n == m else 1 for n, m in zip(counts, samples, strict=True)]
    rows = [
        row
        for o, n, m in zip(outputs, counts, samples, strict=True)
        for row in (rows_of([o]) if n == m else [o])
    ]
    return RowBank.of(calls, sizes, device=device), rows


def _tell_unreached(job: Job, task: BlockTask) -> None:
    """Say which layers the calibration data does not reach."""
    assert task.inputs is not None
    args, kwargs = task.inputs.take(task.inputs.chunks(1, 1)[0])
    found = unreached(task.block, [target.ref for target in task.targets], args, kwargs)
    if found:
        job.note("warning", remark(task.name, found))


def _head(job: Job, task: BlockTask) -> BlockResult:
    quantize = getattr(job.algorithm, "quantize_head", None)
    if quantize is None or task.inputs is None:
        return BlockResult(nearest_of(task))
    result: BlockResult = quantize(task)
    return result


def _part(
    result: BlockResult, targets: Sequence[Target], ranges: Mapping[str, Tensor]
) -> BlockResult:
    """Return one block's share of a window's result, with the ranges of its activations."""
    weights = {
        t.ref.layer: with_range(result.weights[t.ref.layer], t.scheme, ranges.get(t.ref.layer))
        for t in targets
    }
    return dataclasses.replace(result, weights=weights)


def _check_finite(task: BlockTask) -> None:
    bad = [t.ref.layer for t in task.targets if not torch.isfinite(task.weight(t)).all()]
    if bad:
        msg = f"weights with NaN or infinite values cannot be quantized: {', '.join(bad)}"
        raise TunerError(msg)
