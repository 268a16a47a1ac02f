"""How many rows each set of a request gives."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ar_tuner.calibration.grammar import SetRequest
    from ar_tuner.calibration.packing import Row


def shares(requests: Sequence[SetRequest], total: int) -> list[int]:
    """Return the rows of each set: `num` where it is given, an equal part of the rest elsewhere.

    Where the `num`s alone come to more than `total`, they are parts of it in their proportion.

    Raises:
        TunerError: nothing is left for a set.
    """
    numbers = [request.num for request in requests]
    asked = sum(n for n in numbers if n is not None)
    free = numbers.count(None)
    if not free and asked > total:
        out = _in_proportion([n or 0 for n in numbers], total)
    else:
        even = _in_proportion([1] * free, max(0, total - asked)) if free else []
        rest = iter(even)
        out = [next(rest) if n is None else n for n in numbers]
    empty = [request.label for request, n in zip(requests, out, strict=True) if n == 0]
    if empty:
        msg = (
            f"no row is left for the calibration dataset {empty[0]}: {len(out)} sets share "
            f"{total} rows, {asked} of them asked for by num. Raise nsamples or lower num."
        )
        raise TunerError(msg)
    return out


def draw(
    streams: Sequence[Iterator[Row]], parts: Sequence[int], unbounded: Sequence[bool]
) -> list[list[Row]]:
    """Return the rows of each stream: its part and, of the unbounded, what the others lack."""
    out = [list(itertools.islice(s, n)) for s, n in zip(streams, parts, strict=True)]
    missing = sum(parts) - sum(map(len, out))
    givers = [i for i, free in enumerate(unbounded) if free and len(out[i]) == parts[i]]
    while missing and givers:
        for index in givers[:missing]:
            row = next(streams[index], None)
            if row is None:
                givers.remove(index)
            else:
                out[index].append(row)
                missing -= 1
    return out


def _in_proportion(weights: Sequence[int], total: int) -> list[int]:
    """Return whole parts of a total, each within one of its exact share (largest remainders)."""
    whole = sum(weights)
    parts = [total * w // whole for w in weights]
    order = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return parts
