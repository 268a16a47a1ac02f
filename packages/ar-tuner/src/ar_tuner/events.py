"""What a run tells while it works: one frozen record per event."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

Level: TypeAlias = Literal["info", "warning"]


@dataclass(frozen=True)
class Event:
    """Base of all events. `kind` is a stable identifier for programs that read the log."""

    kind: ClassVar[str] = "event"

    def to_dict(self) -> dict[str, Any]:
        """Return the event as plain values, `kind` first."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class RunStarted(Event):
    """Work begins; `resumed_blocks` of `blocks` were finished by an earlier, interrupted run."""

    kind: ClassVar[str] = "run_started"
    run_dir: str
    blocks: int
    layers: int
    settings: Mapping[str, Any]
    resumed_blocks: int


@dataclass(frozen=True)
class CalibrationReady(Event):
    """The calibration rows are there: how many, of how many tokens in all, from which sets."""

    kind: ClassVar[str] = "calibration_ready"
    rows: int
    tokens: int
    seconds: float
    sources: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class BlockStarted(Event):
    """Work on a block begins (not sent for blocks restored from an earlier run)."""

    kind: ClassVar[str] = "block_started"
    index: int
    total: int
    name: str


@dataclass(frozen=True)
class ExpertTokens(Event):
    """How many calibration tokens each expert of a list (`...mlp.experts`) was sent."""

    kind: ClassVar[str] = "expert_tokens"
    index: int
    name: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class BlockProgress(Event):
    """A block is being tuned; `loss` is that of the last minibatch."""

    kind: ClassVar[str] = "block_progress"
    index: int
    total: int
    name: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class BlockDone(Event):
    """A block is final.

    Losses are mean squared errors of the block's output (for the output head: KL divergence of the
    probabilities, in nats) on the same rows, rounded to nearest and as returned; None where nothing
    was measured. `eta_seconds` is None until it can be told.
    """

    kind: ClassVar[str] = "block_done"
    index: int
    total: int
    name: str
    loss_before: float | None
    loss_after: float | None
    seconds: float
    peak_bytes: int
    eta_seconds: float | None


@dataclass(frozen=True)
class ScoringProgress(Event):
    """Layers are scored for a mixed precision, or some predictions measured (`probing`).

    `eta_seconds` is None until it can be told.
    """

    kind: ClassVar[str] = "scoring_progress"
    stage: Literal["scoring", "probing"]
    done: int
    total: int
    seconds: float
    peak_bytes: int
    eta_seconds: float | None


@dataclass(frozen=True)
class SchemeChosen(Event):
    """A mixed precision is decided.

    `layers` counts layers by option; `predicted_loss` is a divergence in nats per token, before
    any tuning.
    """

    kind: ClassVar[str] = "scheme_chosen"
    target: float
    bits: float
    bytes: int
    predicted_loss: float
    layers: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage begins to refine the whole model."""

    kind: ClassVar[str] = "stage_started"
    name: str
    steps: int


@dataclass(frozen=True)
class StageProgress(Event):
    """A stage is at work; `loss` is that of the last rows."""

    kind: ClassVar[str] = "stage_progress"
    name: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class StageDone(Event):
    """A stage has ended; losses are those of held-out rows, equal if its result was not kept."""

    kind: ClassVar[str] = "stage_done"
    name: str
    loss_before: float | None
    loss_after: float | None
    seconds: float


@dataclass(frozen=True)
class Note(Event):
    """Something a user should know; a warning when the result differs from what was asked."""

    kind: ClassVar[str] = "note"
    level: Level
    text: str


@dataclass(frozen=True)
class RunFinished(Event):
    """The result is complete: on disk at `output`, or in memory when that is empty."""

    kind: ClassVar[str] = "run_finished"
    output: str
    seconds: float
    peak_bytes: int
    bits_per_weight: float


RunEvent: TypeAlias = (
    RunStarted
    | CalibrationReady
    | ScoringProgress
    | SchemeChosen
    | BlockStarted
    | ExpertTokens
    | BlockProgress
    | BlockDone
    | StageStarted
    | StageProgress
    | StageDone
    | Note
    | RunFinished
)
