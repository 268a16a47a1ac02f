"""What ar-tuner itself brings, entering through the same hooks as a third party's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_tuner.algorithms.opt_rtn import OptRtn
from ar_tuner.algorithms.rtn import Rtn
from ar_tuner.algorithms.second_order import SecondOrder
from ar_tuner.algorithms.signround import SignRound
from ar_tuner.auto_scheme.scorers.delta_loss import DeltaLoss
from ar_tuner.auto_scheme.scorers.fisher import Fisher
from ar_tuner.calibration.hub import SETS
from ar_tuner.calibration.sources import EmbeddedTexts
from ar_tuner.distill import Distill
from ar_tuner.hookspecs import hookimpl
from ar_tuner.source import QUANTIZATION_KEYS, FloatSource

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ar_tuner.algorithms.base import Algorithm
    from ar_tuner.auto_scheme.scorers import Scorer
    from ar_tuner.calibration.sources import DatasetSource
    from ar_tuner.source import Source
    from ar_tuner.stages import Stage


@hookimpl
def ar_register_algorithms() -> list[Algorithm | Stage]:
    """Return the built-in algorithms and stages."""
    return [SecondOrder(), SignRound(), OptRtn(), Rtn(), Distill()]


@hookimpl
def ar_register_datasets() -> list[DatasetSource]:
    """Return the embedded calibration texts and the sets on hubs that have a name here."""
    return [EmbeddedTexts(), *SETS]


@hookimpl
def ar_register_scorers() -> list[Scorer]:
    """Return the built-in scorers of mixed precisions."""
    return [Fisher(), DeltaLoss()]


@hookimpl
def ar_open_source(path: Path, config: Mapping[str, Any]) -> Source | None:
    """Return the source of a checkpoint of floats."""
    if any(config.get(key) for key in QUANTIZATION_KEYS):
        return None
    return FloatSource.of(path)
