"""Tell on stderr how a run goes: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from ar_cli.output import duration, size

if TYPE_CHECKING:
    from ar_tuner.events import BlockProgress, RunEvent, ScoringProgress, StageDone, StageProgress


class Progress:
    """A listener for the events of a run."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._shown = 0
        self._left: float | None = None
        self._mark = (0.0, 0)

    def __call__(self, event: RunEvent) -> None:
        """Take note of an event."""
        from ar_tuner import events

        if isinstance(event, events.BlockProgress):
            self._step(event)
            return
        if isinstance(event, events.StageProgress):
            self._advance(event)
            return
        if isinstance(event, events.StageStarted):
            self._mark = (time.perf_counter(), 0)
        if isinstance(event, events.ScoringProgress) and self._live:
            self._show(_scoring(event))
            return
        line = describe(event)
        if line is not None:
            self._clear()
            self._stream.write(line + "\n")
            self._stream.flush()
        if isinstance(event, events.BlockDone):
            self._left = event.eta_seconds

    def _step(self, event: BlockProgress) -> None:
        left = "" if self._left is None else f"  about {duration(self._left)} left"
        self._show(
            f"block {event.index + 1}/{event.total}  step {event.step}/{event.steps}  "
            f"loss {event.loss:.3g}{left}"
        )

    def _advance(self, event: StageProgress) -> None:
        now = time.perf_counter()
        pace = (now - self._mark[0]) / max(1, event.step - self._mark[1])
        self._mark = (now, event.step)
        left = pace * (event.steps - event.step)
        self._show(
            f"{event.name}  step {event.step}/{event.steps}  {_what(event)} {event.loss:.3g}"
            f"  about {duration(left)} left"
        )

    def _show(self, text: str) -> None:
        if not self._live:
            return
        self._clear()
        self._stream.write(text)
        self._stream.flush()
        self._shown = len(text)

    def _clear(self) -> None:
        if self._shown:
            self._stream.write("\r" + " " * self._shown + "\r")
            self._shown = 0


def describe(event: RunEvent) -> str | None:
    """Return the line an event is worth, or None."""
    from ar_tuner import events

    if isinstance(event, events.Note):
        return f"{'warning: ' if event.level == 'warning' else ''}{event.text}"
    if isinstance(event, events.CalibrationReady):
        return f"calibration: {event.rows} rows, {event.tokens} tokens"
    if isinstance(event, events.ScoringProgress):
        return _scoring(event)
    if isinstance(event, events.SchemeChosen):
        layers = ", ".join(f"{n} x {name}" for name, n in sorted(event.layers.items()))
        return (
            f"chosen: {layers}; {event.bits:.3f} bits, {size(event.bytes)}, "
            f"predicted loss {event.predicted_loss:.4g}  {duration(event.seconds)}"
        )
    if isinstance(event, events.RunStarted):
        resumed = f", {event.resumed_blocks} already done" if event.resumed_blocks else ""
        where = f"; log and finished blocks in {event.run_dir}" if event.run_dir else ""
        return f"{event.layers} layers in {event.blocks} blocks{resumed}{where}"
    if isinstance(event, events.StageDone):
        loss = ""
        if event.loss_before is not None and event.loss_after is not None:
            loss = f"  {_what(event)} {event.loss_before:.3g} -> {event.loss_after:.3g}"
        return f"{event.name}{loss}  {duration(event.seconds)}"
    if isinstance(event, events.BlockDone):
        loss = ""
        if event.loss_before is not None and event.loss_after is not None:
            loss = f"  loss {event.loss_before:.3g} -> {event.loss_after:.3g}"
        left = "" if not event.eta_seconds else f"  left {duration(event.eta_seconds)}"
        return (
            f"block {event.index + 1}/{event.total}{loss}  {duration(event.seconds)}  "
            f"peak {size(event.peak_bytes)}{left}"
        )
    return None


def _what(event: StageProgress | StageDone) -> str:
    """Return what a stage measures."""
    return "KL" if event.name == "distill" else "loss"


def _scoring(event: ScoringProgress) -> str:
    left = "" if not event.eta_seconds else f"  about {duration(event.eta_seconds)} left"
    return f"{event.stage} {event.done}/{event.total}  peak {size(event.peak_bytes)}{left}"
