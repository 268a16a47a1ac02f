"""Rows of equal length from documents of any length: long ones cut, short ones packed."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from ar_tuner.calibration.encode import Encoded, SetEncoder

CHARACTERS = 8
"""Per token: about twice what tokenizers make of prose, so that one look at a text is enough."""


@dataclass(frozen=True)
class Row:
    """Token ids [T] and the numbers of the documents they come from.

    A `whole` row is the beginning of one long document, a `packed` one holds several, a `further`
    one is a later window of a long document.
    """

    ids: NDArray[np.int32]
    documents: tuple[int, ...]
    kind: Literal["whole", "packed", "further"]


class Sieve:
    """Lets a row through once, and none that looks like padding.

    Attributes:
        duplicates, padding: rows that were held back, and why.
    """

    def __init__(self, met: set[bytes]) -> None:
        self._met = met
        self.duplicates = self.padding = 0

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows that may be used; `met` holds those of other sets too."""
        for row in rows:
            digest = hashlib.blake2b(row.ids.tobytes(), digest_size=16).digest()
            if looks_like_padding(row.ids):
                self.padding += 1
            elif digest in self._met:
                self.duplicates += 1
            else:
                self._met.add(digest)
                yield row


def looks_like_padding(ids: NDArray[np.int32]) -> bool:
    """Tell whether more than half of the tokens equal the last one."""
    return ids.size > 2 and int((ids == ids[-1]).sum()) > ids.size // 2


def rows_of(
    documents: SetEncoder, *, seqlen: int, wanted: int, concat: bool = False
) -> Iterator[Row]:
    """Yield rows of `seqlen` tokens for as long as there are any.

    The beginnings of long documents come first, in the order of the documents, then short
    documents packed together, then later windows of the long ones: all second windows, all third
    ones. No two rows overlap. With `concat` all documents are joined and the stream is cut.

    Documents are encoded only as far as `wanted` rows are likely to need; what lies behind is
    looked at when the rest has been used up.
    """
    most = 2 * CHARACTERS * seqlen * wanted
    if concat:
        yield from joined(documents.encoded(most), seqlen, documents.encoder.separator)
        return
    each = CHARACTERS * seqlen * math.ceil(wanted / max(1, len(documents)))
    long: list[Encoded] = []
    short: list[Encoded] = []
    for document in documents.encoded(each):
        if document.cut and not document.windows(seqlen):
            document = documents.again(document, most)  # noqa: PLW2901
        if document.windows(seqlen):
            yield Row(document.window(0, seqlen), (document.number,), "whole")
            long.append(document)
        else:
            short.append(document)
    yield from joined(short, seqlen, documents.encoder.separator)
    yield from _further(long, [1] * len(long), seqlen)
    cut = [document for document in long if document.cut]
    had = [document.windows(seqlen) for document in cut]
    yield from _further([documents.again(d, most) for d in cut], had, seqlen)


def joined(documents: Iterable[Encoded], seqlen: int, separator: Sequence[int]) -> Iterator[Row]:
    """Yield rows of documents one after the other, each ended by the separator.

    Every document and every row begins with the tokens a model expects there; the last, unfilled
    row is left out.
    """
    row: list[NDArray[np.int32]] = []
    numbers: list[int] = []
    room = seqlen
    for document in documents:
        before = np.asarray(document.prefix, dtype=np.int32)
        rest = np.concatenate([document.body, np.asarray(separator, dtype=np.int32)])
        begins = True
        while rest.size:
            piece = np.concatenate([before, rest]) if begins or not row else rest
            begins = False
            row.append(piece[:room])
            used = max(0, row[-1].size - (piece.size - rest.size))
            if used:
                numbers.append(document.number)
            rest = rest[used:]
            room -= row[-1].size
            if not room:
                yield Row(np.concatenate(row), tuple(dict.fromkeys(numbers)), "packed")
                row, numbers, room = [], [], seqlen


def _further(documents: Sequence[Encoded], had: Sequence[int], seqlen: int) -> Iterator[Row]:
    counts = [document.windows(seqlen) for document in documents]
    for index in range(min(had, default=0), max(counts, default=0)):
        for document, first, count in zip(documents, had, counts, strict=True):
            if first <= index < count:
                yield Row(document.window(index, seqlen), (document.number,), "further")
