"""Rows for tuning and rows for judging it, with no document on both sides."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from typing import TYPE_CHECKING

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def split_rows(
    documents: Sequence[Iterable[int]], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Return the numbers of the rows to tune on and of those held out, both in rising order.

    Rows that have a document in common stay on one side. Packed rows form long chains (each
    begins with the end of a document that began in the row before); where a chain has to be cut,
    the row at the cut is on neither side.

    Args:
        documents: for every row, the numbers of the documents in it
            (`CalibrationReport.documents`).
        share: part of the rows to hold out, between 0 and 1; at least one row is.
        seed: of the choice; the same arguments give the same rows.

    Raises:
        TunerError: a share out of range, or nothing would be left to tune on.
    """
    if not 0 < share < 1:
        msg = f"share {share!r} of held-out rows is not allowed: use a number between 0 and 1"
        raise TunerError(msg)
    wanted = max(1, round(share * len(documents)))
    near = _neighbours(documents)
    groups = _groups(near)
    random.Random(seed).shuffle(groups)  # noqa: S311 - a choice, not a secret
    held: set[int] = set()
    for group in groups:
        if len(held) + len(group) <= wanted:
            held.update(group)
    left = [group for group in groups if group[0] not in held]
    if len(held) < wanted and left:
        held.update(_part_of(left, near, wanted - len(held)))
    border = _beside(held, near)
    train = [row for row in range(len(documents)) if row not in held and row not in border]
    if not train:
        msg = (
            f"{len(documents)} calibration rows cannot be split: every row has a document in "
            "common with the held-out ones. Give more documents, or hold nothing out."
        )
        raise TunerError(msg)
    return train, sorted(held)


def _part_of(
    groups: Sequence[Sequence[int]], near: Sequence[Sequence[int]], wanted: int
) -> Sequence[int]:
    """Return about `wanted` rows: the smallest group, or a run of the largest if less is lost."""
    smallest = min(groups, key=len)
    far = _reached(max(groups, key=len)[0], near)[-1]  # an end of a chain borders on one row only
    run = _reached(far, near)[:wanted]
    lost = len(_beside(run, near) - set(run))
    return smallest if len(groups) > 1 and len(smallest) - wanted <= lost else run


def _beside(rows: Iterable[int], near: Sequence[Sequence[int]]) -> set[int]:
    return {other for row in rows for other in near[row]}


def _neighbours(documents: Sequence[Iterable[int]]) -> list[list[int]]:
    rows_with: dict[int, list[int]] = defaultdict(list)
    sets = [sorted(set(numbers)) for numbers in documents]
    for row, numbers in enumerate(sets):
        for number in numbers:
            rows_with[number].append(row)
    return [sorted({r for n in numbers for r in rows_with[n]}) for numbers in sets]


def _groups(near: Sequence[Sequence[int]]) -> list[list[int]]:
    met: set[int] = set()
    out = []
    for start in range(len(near)):
        if start not in met:
            out.append(_reached(start, near))
            met.update(out[-1])
    return out


def _reached(start: int, near: Sequence[Sequence[int]]) -> list[int]:
    """Return the rows that hang together with one, the nearest first."""
    order, met, queue = [], {start}, deque([start])
    while queue:
        row = queue.popleft()
        order.append(row)
        for other in near[row]:
            if other not in met:
                met.add(other)
                queue.append(other)
    return order
