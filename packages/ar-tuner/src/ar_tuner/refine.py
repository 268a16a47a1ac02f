"""The way of a whole model through a stage: rows, float weights, state, result."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ar_tuner import events
from ar_tuner.blocks import NON_TEXT
from ar_tuner.calibration.split import split_rows
from ar_tuner.errors import TunerError
from ar_tuner.parts import replacements
from ar_tuner.residence import outside, send
from ar_tuner.stages import ModelResult, ModelTarget, ModelTask, StageSettings
from ar_tuner.whole import whole_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerPlan
    from ar_tuner.others import Inputs
    from ar_tuner.pipeline import Job
    from ar_tuner.run import Run
    from ar_tuner.stages import Stage

HELD_OUT = 32
"""Rows that decide whether a stage's result is kept, if there are enough."""
_SHARE = 1 / 16
_BYTES = 16
"""Of memory per weight while it moves: latent, two moments, what the model computes with."""
_FLAT_BYTES = 2
"""The same where codes stay: the code, and the state of a factor for every few weights."""
_PAUSE = 60.0
_ROOM = 0.6
"""Share of the free memory that a stage may ask for."""


@dataclass(frozen=True)
class Others:
    """Samples that hold more than tokens (images), by use; see `Rows`."""

    walk: tuple[Inputs, ...] = ()
    stage: tuple[Inputs, ...] = ()
    held_out: tuple[Inputs, ...] = ()

    @property
    def all(self) -> tuple[Inputs, ...]:
        """Every one, for a fingerprint."""
        return self.walk + self.stage + self.held_out

    @classmethod
    def shared_out(cls, samples: Sequence[Inputs], walk: int, *, stage: bool) -> Others:
        """Return samples by use: the first `walk` for the walk, one in 16 of all held out."""
        if not stage or len(samples) < 2:  # noqa: PLR2004 - one of which would be held out
            return cls(tuple(samples[:walk]))
        held = max(1, min(HELD_OUT, round(_SHARE * len(samples))))
        train = samples[:-held]
        return cls(tuple(train[:walk]), tuple(train), tuple(samples[-held:]))


@dataclass(frozen=True)
class Rows:
    """Calibration tokens, told apart by use.

    Attributes:
        walk: rows that blocks are tuned on [N, T].
        stage: rows that a stage learns from; of other documents where there are enough.
        held_out: rows of documents that neither sees; None without a stage.
        others: samples that hold more than tokens, one each, by the same uses.
    """

    walk: Tensor
    stage: Tensor | None = None
    held_out: Tensor | None = None
    others: Others = Others()

    @property
    def all(self) -> list[Tensor]:
        """Everything there is, for a fingerprint."""
        parts = (self.walk, self.stage, self.held_out)
        rows = torch.cat([p for p in parts if p is not None])
        return [rows, *(v for part in self.others.all for _, v in sorted(part.items()))]

    @property
    def count(self) -> int:
        """Samples that blocks are tuned on."""
        return len(self.walk) + len(self.others.walk)


def wanted_rows(nsamples: int, settings: StageSettings) -> int:
    """Return how many calibration rows a run with a stage has a use for."""
    return nsamples + settings.steps * settings.batch_size + HELD_OUT


def share_out(
    rows: Tensor, documents: Sequence[Sequence[int]], nsamples: int, settings: StageSettings
) -> Rows | None:
    """Return the rows by use, or None where there are too few to hold any out.

    No document is on two sides, unless one is in every row.

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
    try:
        train, held = split_rows(documents, share, settings.seed)
    except TunerError:  # one document in every row: its end, and nothing of the row before that
        first = count - max(1, round(share * count))
        train, held = list(range(first - 1)), list(range(first, count))
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
        others: samples that hold more than tokens.
        floats: float weights by parameter name, as the model stored them before the walk; those
            of the blocks come in as the walk reaches each.
        gains: names of the float parameters that may move.
    """

    stage: Stage
    settings: StageSettings
    rows: Tensor
    held_out: Tensor
    floats: dict[str, Tensor]
    gains: tuple[str, ...]
    others: Others = Others()


def copy_floats(job: Job, index: int) -> dict[str, Tensor]:
    """Return the float weights of a block that the plan quantizes, by parameter name, in RAM."""
    block = job.blocks[index]
    names = dict.fromkeys(t.ref.parameter for t in job.targets(block))
    return {
        f"{block.name}.{name}": block.module.get_parameter(name).data.to("cpu", copy=True)
        for name in names
    }


@contextlib.contextmanager
def gathered(job: Job) -> Iterator[None]:
    """Have the whole model on one device, if the walk used any; then in its place again."""
    placement = job.residence.placement
    job.residence.keep = True
    job.residence.whole()
    send(job.model.modules(), next(iter(placement.blocks), None))
    try:
        yield
    finally:
        job.residence.whole()
        send(outside(job.model, [b.module for b in job.discovery.blocks]), placement.home)


def workplace(job: Job) -> torch.device:
    """Return the device that a stage works on: that of the first block."""
    first = next(iter(job.residence.placement.blocks), None)
    return next(job.model.parameters()).device if first is None else first


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
    device = next(job.model.parameters()).device
    floats = {k: v.to(device) for k, v in refinement.floats.items()}
    weights = {layer: weight.to(device) for layer, weight in weights.items()}
    emit(events.StageStarted(name, refinement.settings.steps))
    targets = _targets(job, floats, weights)
    apart = {t.parameter for t in targets if not t.ref.whole}
    task = ModelTask(
        logits=whole_model(job, weights, floats, flat=refinement.settings.flat),
        targets=targets,
        stored={n: job.model.get_parameter(n).data for n in apart},
        gains={n: job.model.get_parameter(n).data for n in refinement.gains},
        rows=refinement.rows.to(device),
        held_out=refinement.held_out.to(device),
        settings=refinement.settings,
        report=lambda step, steps, loss: emit(events.StageProgress(name, step, steps, loss)),
        save=_Keeper(run, name) if run is not None else lambda state, done: None,
        saved=None if run is None else run.get_state(name),
        others=refinement.others.stage,
        held_others=refinement.others.held_out,
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


def norm_gains(model: nn.Module) -> tuple[str, ...]:
    """Return the parameter names of the gains of the text decoder's norms."""
    out = []
    for name, module in model.named_modules():
        gain = getattr(module, "weight", None)
        is_norm = "norm" in type(module).__name__.lower() and not NON_TEXT.search(name)
        if is_norm and isinstance(gain, torch.Tensor) and gain.ndim == 1:
            out.append(f"{name}.weight")
    return tuple(out)


@dataclass(frozen=True)
class Fit:
    """How a stage fits the machine.

    Attributes:
        refusal: why it cannot work at all, or None.
        flat: codes have to stay, and blocks are computed again (`StageSettings.flat`).
        reason: why it is flat, where nobody asked for that.
        max_saved: bytes left for what a forward pass keeps.
    """

    refusal: str | None = None
    flat: bool = False
    reason: str | None = None
    max_saved: int = StageSettings.max_saved

    def apply(self, settings: StageSettings) -> StageSettings:
        """Return the numbers of a stage that fits so."""
        return dataclasses.replace(settings, flat=self.flat, max_saved=self.max_saved)


def fit(plan: LayerPlan, job: Job, *, flat: bool = False, may_be_flat: bool = False) -> Fit:
    """Return how a stage fits: the whole model has to be in memory, the float weights beside.

    Args:
        plan: what is quantized.
        job: the walk before it.
        flat: what the user asked for.
        may_be_flat: the stage can do without moving codes where memory is short.
    """
    if job.adapter.entry(job.model) is not job.model:
        return Fit("the model as a whole cannot be run on text")
    find = getattr(job.model, "get_output_embeddings", None)
    if find is None or find() is None:
        return Fit("the model predicts no tokens")
    device = workplace(job)
    weights = sum(r.layer.rows * r.layer.columns for r in plan.quantized)
    absent = sum(p.nbytes for p in job.model.parameters() if p.device != device)
    there = absent + weights * next(job.model.parameters()).element_size()
    free = _free(device)
    if free is None:
        return Fit(flat=flat)
    room = int(_ROOM * free)
    reason = None
    if not flat and there + weights * _BYTES > room:
        reason = f"it needs about {_gib(there + weights * _BYTES)} and {_gib(free)} are free"
        if not may_be_flat:
            return Fit(reason)
        flat = True
    need = there + weights * (_FLAT_BYTES if flat else _BYTES)
    if need > room:
        return Fit(f"it needs about {_gib(need)} and {_gib(free)} are free")
    return Fit(None, flat, reason, max(free - need, 0) // 2)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def install_refined(
    job: Job, weights: Mapping[str, QuantizedWeight], tensors: Mapping[str, Tensor]
) -> None:
    """Put what a stage made into the model."""
    for block in job.blocks:
        made = replacements(block.module, [t.ref for t in job.targets(block)], weights)
        for name, value in made.items():
            block.module.get_parameter(name).data = value.contiguous()
    for name, tensor in tensors.items():
        stored = job.model.get_parameter(name)
        stored.data = tensor.to(stored)


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, IndexError, ValueError, StopIteration):
        # of Linux: counts what files occupy that can be dropped, the model's own among them
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable"))
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
            original, ref = t.ref.view(floats[name]), t.ref
            target = ModelTarget(ref.layer, name, ref.transposed, t.scheme, weight, original)
            out.append(dataclasses.replace(target, expert=ref.expert, rows=ref.rows))
    return tuple(out)
