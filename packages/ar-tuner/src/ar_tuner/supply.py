"""The calibration rows of a run, told apart by use."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner import events
from ar_tuner.calibration import calibration_rows, check_ids, check_seqlen
from ar_tuner.errors import TunerError
from ar_tuner.imagery import adapter_for
from ar_tuner.refine import HELD_OUT, Others, Rows, share_out, wanted_rows

if TYPE_CHECKING:
    from torch import nn

    from ar_tuner.api import AutoRound
    from ar_tuner.imagery import Imagery
    from ar_tuner.stages import StageSettings


def rows_by_use(request: AutoRound, tokenizer: Any, model: nn.Module) -> Rows:
    """Return the calibration samples by use, after telling what they are made of."""
    recipe = request.settings.chosen
    numbers = _numbers(request)
    imagery: Imagery | None = getattr(adapter_for(request, model), "imagery", None)
    seen = 0 if imagery is None else imagery.share(recipe.nsamples)
    if imagery is None or seen == 0:
        data = request.dataset if imagery is None else imagery.text
        return _rows(request, tokenizer, model, data, recipe.nsamples)
    if request.settings.token_weights:
        msg = "token_weights weighs rows of text only. Leave it out, or use calibration 'text'."
        raise TunerError(msg)
    texts = recipe.nsamples - seen
    rows = Rows(torch.zeros(0, 1, dtype=torch.int64))
    if texts:
        rows = _rows(request, tokenizer, model, imagery.text, texts)
    began = time.perf_counter()
    seqlen = check_seqlen(
        recipe.seqlen, getattr(model, "config", None), asked=request.settings.seqlen is not None
    )
    more = 0 if numbers is None else min(seen, numbers.steps * numbers.batch_size) + HELD_OUT
    samples, notes = imagery.samples(
        seen + more, seqlen=seqlen, seed=request.settings.seed, model=model
    )
    for note in notes:
        request.emit(note)
    staged = numbers is not None and (rows.held_out is not None or not texts)
    others = Others.shared_out(samples, seen, stage=staged)
    if len(samples) < seen:
        text = f"calibration: {len(samples)} samples with images, fewer than the {seen} asked for"
        request.emit(events.Note("warning", text))
    tokens = sum(sample["input_ids"].numel() for sample in others.walk)
    seconds = time.perf_counter() - began
    request.emit(
        events.CalibrationReady(len(others.walk), tokens, seconds, (("images", len(others.walk)),))
    )
    if not texts and others.held_out:  # a stage of these alone
        rows = dataclasses.replace(rows, stage=rows.walk, held_out=rows.walk)
    return dataclasses.replace(rows, others=others)


def _numbers(request: AutoRound) -> StageSettings | None:
    """Return the numbers of the stage that takes the most rows, as the widths are not known yet."""
    recipe = request.settings.chosen
    if recipe.stage is None:
        return None
    quantized = request.scheme.activation is not None
    return recipe.stage_settings(request.settings.seed, activations=quantized)


def _rows(request: AutoRound, tokenizer: Any, model: nn.Module, data: Any, nsamples: int) -> Rows:
    """Return rows of text by use."""
    recipe = request.settings.chosen
    numbers = _numbers(request)
    began = time.perf_counter()
    seqlen = check_seqlen(
        recipe.seqlen, getattr(model, "config", None), asked=request.settings.seqlen is not None
    )
    rows, report = calibration_rows(
        data,
        tokenizer,
        nsamples=nsamples if numbers is None else wanted_rows(nsamples, numbers),
        seqlen=seqlen,
        seed=request.settings.seed,
        allow_download=request.settings.allow_download,
    )
    check_ids(rows, getattr(model, "config", None))
    for note in dataclasses.replace(report, asked=min(nsamples, report.asked)).notes():
        request.emit(note)
    seconds = time.perf_counter() - began
    request.emit(events.CalibrationReady(len(rows), rows.numel(), seconds, report.sources))
    if numbers is None:
        return Rows(rows)
    shared = share_out(rows, report.documents, nsamples, numbers)
    if shared is None:
        few = f"{len(rows)} calibration rows are too few to hold any out"
        text = f"{recipe.stage} is left out: {few}"
        request.emit(events.Note("warning", text))
    return Rows(rows[:nsamples]) if shared is None else shared
