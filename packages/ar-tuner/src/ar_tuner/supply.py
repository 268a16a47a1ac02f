"""The calibration rows of a run, told apart by use."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from ar_tuner import events
from ar_tuner.calibration import calibration_rows, check_ids, check_seqlen
from ar_tuner.refine import Rows, share_out, wanted_rows

if TYPE_CHECKING:
    from torch import nn

    from ar_tuner.api import AutoRound


def rows_by_use(request: AutoRound, tokenizer: Any, model: nn.Module) -> Rows:
    """Return the calibration tokens by use, after telling what they are made of."""
    recipe = request.settings.chosen
    numbers = None if recipe.stage is None else recipe.stage_settings(request.settings.seed)
    began = time.perf_counter()
    seqlen = check_seqlen(
        recipe.seqlen, getattr(model, "config", None), asked=request.settings.seqlen is not None
    )
    rows, report = calibration_rows(
        request.dataset,
        tokenizer,
        nsamples=recipe.nsamples if numbers is None else wanted_rows(recipe.nsamples, numbers),
        seqlen=seqlen,
        seed=request.settings.seed,
        allow_download=request.settings.allow_download,
    )
    check_ids(rows, getattr(model, "config", None))
    for note in dataclasses.replace(report, asked=min(recipe.nsamples, report.asked)).notes():
        request.emit(note)
    seconds = time.perf_counter() - began
    request.emit(events.CalibrationReady(len(rows), rows.numel(), seconds, report.sources))
    if numbers is None:
        return Rows(rows)
    shared = share_out(rows, report.documents, recipe.nsamples, numbers)
    if shared is None:
        few = f"{len(rows)} calibration rows are too few to hold any out"
        text = f"{recipe.stage} is left out: {few}"
        request.emit(events.Note("warning", text))
    return Rows(rows[: recipe.nsamples]) if shared is None else shared
