"""What calibration rows are made of, in figures and in words."""

from __future__ import annotations

from dataclasses import dataclass

from ar_tuner.events import Note


@dataclass(frozen=True)
class SetReport:
    """What one set gave.

    Attributes:
        label: its name and splits.
        asked: rows that were to come from it.
        rows: rows that did; `packed` of them hold several short documents, `further` are later
            windows of long ones.
        documents: documents that were looked at.
        duplicates: documents and rows left out because an equal one was there.
        padding: rows left out because one token makes up more than half of them.
        untemplated, refused: chats taken as plain text, for want of a chat template or because
            the template does not take them.
        num: rows the user named.
        as_given: the rows were given as tokens, so none was left out.
    """

    label: str
    asked: int
    rows: int
    packed: int = 0
    further: int = 0
    documents: int = 0
    duplicates: int = 0
    padding: int = 0
    untemplated: int = 0
    refused: int = 0
    num: int | None = None
    as_given: bool = False


@dataclass(frozen=True)
class CalibrationReport:
    """What the rows are made of, and how many were asked for.

    Attributes:
        asked: rows wanted.
        seqlen: tokens in a row.
        sets: one record per set.
        documents: for every row, the numbers of the documents in it; equal documents have equal
            numbers.
    """

    asked: int
    seqlen: int
    sets: tuple[SetReport, ...]
    documents: tuple[tuple[int, ...], ...] = ()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(part.rows for part in self.sets)

    @property
    def sources(self) -> tuple[tuple[str, int], ...]:
        """Rows by set."""
        return tuple((part.label, part.rows) for part in self.sets)

    def notes(self) -> list[Note]:
        """Return what the user should know; a warning where the result is not what was asked."""
        out: list[Note] = []
        for level, text in (*self._about_all(), *(n for s in self.sets for n in _about(s, self))):
            out.append(Note("warning" if level else "info", f"calibration: {text}"))
        return out

    def _about_all(self) -> list[tuple[bool, str]]:
        out = []
        if len(self.sets) > 1:
            parts = ", ".join(f"{rows} from {label}" for label, rows in self.sources)
            out.append((False, f"{self.rows} rows: {parts}"))
        if self.rows < self.asked:
            what = (
                f"the data holds {self.rows} rows of {self.seqlen} tokens, fewer than the "
                f"{self.asked} asked for; give more text or a smaller seqlen"
            )
            out.append((True, what))
        return out


def _about(part: SetReport, whole: CalibrationReport) -> list[tuple[bool, str]]:
    out: list[tuple[bool, str]] = []
    if part.num is not None and part.asked < part.num:
        out.append(
            (True, f"{part.label} has {part.asked} rows for num={part.num}: nsamples is less")
        )
    if len(whole.sets) > 1 and part.rows < part.asked:
        out.append((True, f"{part.label} gave {part.rows} of the {part.asked} rows due from it"))
    if part.packed or part.further:
        what = (
            f"of {part.rows} rows from {part.label}, {part.packed} are texts joined and "
            f"{part.further} are later parts of long ones"
        )
        out.append((False, what))
    if part.duplicates or part.padding:
        found = f"{part.duplicates} duplicates, {part.padding} rows that are mostly one token"
        rest = "; rows given as tokens are used all the same" if part.as_given else ""
        out.append((False, f"{'' if rest else 'left out of '}{part.label}: {found}{rest}"))
    plain = f"chats of {part.label} are plain text: the"
    if part.untemplated:
        out.append((False, f"{part.untemplated} {plain} tokenizer has no chat template"))
    if part.refused:
        out.append((True, f"{part.refused} {plain} chat template does not take them"))
    return out
