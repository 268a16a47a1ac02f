"""The tokens that layers are scored with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_tuner.calibration import calibration_rows, check_ids, check_seqlen

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ar_tuner.api import AutoRound
    from ar_tuner.auto_scheme.choose import Chooser


def scoring_rows(request: AutoRound, chooser: Chooser, tokenizer: Any, model: nn.Module) -> Tensor:
    """Return the tokens [N, T] that an `AutoScheme` scores with, after telling their notes."""
    asked, config = chooser.asked, getattr(model, "config", None)
    rows, report = calibration_rows(
        request.dataset if asked.dataset is None else asked.dataset,
        tokenizer,
        nsamples=asked.number("nsamples"),
        seqlen=check_seqlen(asked.number("seqlen"), config, asked=asked.seqlen is not None),
        seed=asked.seed,
        allow_download=request.settings.allow_download,
    )
    check_ids(rows, config)
    for note in report.notes():
        request.emit(note)
    return rows
