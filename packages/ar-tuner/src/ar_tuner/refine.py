"""The way of a whole model through a stage: rows, float weights, state, result."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from ar_tuner import events
from ar_tuner.activations import quantized_activations, static_ranges
from ar_tuner.algorithms.base import as_parameter
from ar_tuner.blocks import NON_TEXT, Block
from ar_tuner.calibration.split import split_rows
from ar_tuner.stages import ModelResult, ModelTarget, ModelTask, StageSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerPlan
    from ar_tuner.pipeline import Job
    from ar_tuner.run import Run
    from ar_tuner.stages import Stage

HELD_OUT = 32
"""Rows that decide whether a stage's result is kept, if there are enough."""
_SHARE = 1 / 16
_BYTES = 16
"""Of memory per weight while it moves: latent, two moments, what the model computes with."""
_PAUSE = 60.0
_ROOM = 0.6
"""Share of the free memory that a stage may ask for."""


@dataclass(frozen=True)
class Rows:
    """Calibration tokens, told apart by use.

    Attributes:
        walk: rows that blocks are tuned on [N, T].
        stage: rows that a stage learns from; of other documents where there are enough.
        held_out: rows of documents that neither sees; None without a stage.
    """

    walk: Tensor
    stage: Tensor | None = None
    held_out: Tensor | None = None

    @property
    def all(self) -> Tensor:
        """Every row, for a fingerprint."""
        parts = (self.walk, self.stage, self.held_out)
        return torch.cat([p for p in parts if p is not None])


def wanted_rows(nsamples: int, settings: StageSettings) -> int:
    """Return how many calibration rows a run with a stage has a use for."""
    return nsamples + settings.steps * settings.batch_size + HELD_OUT


def share_out(
    rows: Tensor, documents: Sequence[Sequence[int]], nsamples: int, settings: StageSettings
) -> Rows | None:
    """Return the rows by use, or None where there are too few to hold any out.

    Args:
        rows: token ids [N, T].
        documents: for every row, the numbers of the documents in it.
        nsamples: rows for the walk.
        settings: of the stage.
    """
    count = rows.shape[0]
    if count < 1 / _SHARE:
        return None
    share = min(HELD_OUT / count, _SHARE)
    train, held = split_rows(documents, share, settings.seed)
    walk, rest = train[:nsamples], train[nsamples:]
    enough = len(rest) * 2 >= settings.steps * settings.batch_size
    return Rows(rows[walk], rows[rest if enough else train], rows[held])


@dataclass(frozen=True)
class Refinement:
    """A stage that follows the walk.

    Attributes:
        stage: what refines the model.
        settings: its numbers.
        rows, held_out: token ids.
        floats: float weights by parameter name, as the model stored them before the walk.
    """

    stage: Stage
    settings: StageSettings
    rows: Tensor
    held_out: Tensor
    floats: Mapping[str, Tensor]


def copy_floats(job: Job, others: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the float weights of everything the plan quantizes, by parameter name.

    `others`: modules outside the blocks, by name.
    """
    out = {
        f"{block.name}.{t.ref.parameter}": block.module.get_parameter(t.ref.parameter).data.clone()
        for block in job.blocks
        for t in job.targets(block)
    }
    return out | {f"{k}.weight": m.get_parameter("weight").data.clone() for k, m in others.items()}


def refine(
    job: Job,
    refinement: Refinement,
    weights: Mapping[str, QuantizedWeight],
    *,
    emit: Callable[[events.RunEvent], None],
    run: Run | None = None,
) -> ModelResult:
    """Return what a stage makes of the quantized model; changes nothing.

    Args:
        job: the walk that is done; its model holds the dequantized weights.
        refinement: the stage, its rows and the float weights.
        weights: quantized weights of the blocks by layer name.
        emit: takes events.
        run: keeps the state of the stage, so that a killed one goes on where it was.
    """
    name, began = refinement.stage.name, time.perf_counter()
    emit(events.StageStarted(name, refinement.settings.steps))
    task = ModelTask(
        logits=_logits(job, weights, refinement.floats),
        targets=_targets(job, refinement.floats, weights),
        gains=norm_gains(job.model),
        rows=refinement.rows,
        held_out=refinement.held_out,
        settings=refinement.settings,
        report=lambda step, steps, loss: emit(events.StageProgress(name, step, steps, loss)),
        save=_Keeper(run, name) if run is not None else lambda state, done: None,
        saved=None if run is None else run.get_state(name),
    )
    result = refinement.stage.refine(task)
    seconds = time.perf_counter() - began
    emit(events.StageDone(name, result.loss_before, result.loss_after, seconds))
    return result


class _Keeper:
    """Puts a stage's state on disk, at most once in `_PAUSE` seconds."""

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name, self._last = run, name, time.perf_counter()

    def __call__(self, state: Mapping[str, Tensor], done: int) -> None:
        """Keep a state that `done` steps led to, if the last one is old."""
        if time.perf_counter() - self._last >= _PAUSE:
            self._run.put_state(self._name, state, done)
            self._last = time.perf_counter()


def norm_gains(model: nn.Module) -> dict[str, Tensor]:
    """Return the gains of the text decoder's norms by parameter name."""
    out: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        gain = getattr(module, "weight", None)
        is_norm = "norm" in type(module).__name__.lower() and not NON_TEXT.search(name)
        if is_norm and isinstance(gain, torch.Tensor) and gain.ndim == 1:
            out[f"{name}.weight"] = gain.data
    return out


def refusal(model: nn.Module, plan: LayerPlan, job: Job) -> str | None:
    """Return why a stage cannot work on a model on this machine, or None."""
    with torch.no_grad():
        assert job.rows is not None
        output = job.model(**job.adapter.inputs(job.model, job.rows[:1, :2]))
    if not isinstance(getattr(output, "logits", None), torch.Tensor):
        return "the model predicts no tokens"
    weights = sum(r.layer.rows * r.layer.columns for r in plan.quantized)
    need, free = weights * _BYTES, _free(next(model.parameters()).device)
    if free is None or need <= _ROOM * free:
        return None
    return f"it needs about {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"


def install_refined(
    job: Job, weights: Mapping[str, QuantizedWeight], tensors: Mapping[str, Tensor]
) -> None:
    """Put what a stage made into the model."""
    for block in job.blocks:
        for t in job.targets(block):
            if t.ref.layer in weights:
                stored = block.module.get_parameter(t.ref.parameter)
                stored.data = as_parameter(
                    t, weights[t.ref.layer].dequantize(), stored
                ).contiguous()
    for name, tensor in tensors.items():
        stored = job.model.get_parameter(name)
        stored.data = tensor.to(stored)


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _targets(
    job: Job, floats: Mapping[str, Tensor], weights: Mapping[str, QuantizedWeight]
) -> tuple[ModelTarget, ...]:
    out = []
    for block in job.blocks:
        for t in job.targets(block):
            name = f"{block.name}.{t.ref.parameter}"
            weight = weights[t.ref.layer]
            original = t.ref.view(floats[name])
            out.append(ModelTarget(t.ref.layer, name, t.ref.transposed, t.scheme, weight, original))
    return tuple(out)


def _logits(
    job: Job, weights: Mapping[str, QuantizedWeight], floats: Mapping[str, Tensor]
) -> Callable[[Mapping[str, Tensor], Tensor, bool], Tensor]:
    """Return the function of `ModelTask.logits`; unquantized, all floats are in place."""

    def logits(replaced: Mapping[str, Tensor], rows: Tensor, quantized: bool) -> Tensor:  # noqa: FBT001
        inputs = dict(job.adapter.inputs(job.model, rows))
        with contextlib.ExitStack() as stack:
            if quantized:
                for context in _activations(job, weights):
                    stack.enter_context(context)
            names = dict(replaced) if quantized else {**floats, **replaced}
            output: Any = functional_call(job.model, names, (), inputs)
        found: Tensor = output.logits
        return found

    return logits


def _activations(
    job: Job, weights: Mapping[str, QuantizedWeight]
) -> Iterator[contextlib.AbstractContextManager[None]]:
    for block in job.blocks:
        targets = job.targets(block)
        if any(t.scheme.activation is not None for t in targets):
            yield _of_block(block, job, weights)


def _of_block(
    block: Block, job: Job, weights: Mapping[str, QuantizedWeight]
) -> contextlib.AbstractContextManager[None]:
    targets = job.targets(block)
    mine = {t.ref.layer: weights[t.ref.layer] for t in targets}
    return quantized_activations(block.module, targets, static_ranges(mine))
