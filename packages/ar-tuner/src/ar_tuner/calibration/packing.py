"""Rows of equal length from documents of any length: long ones cut, short ones packed."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ar_tuner.calibration.records import ids_of

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Iterator, Sequence

    from ar_tuner.calibration.encode import Encoded, SetEncoder

CHARACTERS = 8
"""Per token: about twice what tokenizers make of prose, so that one look at a text is enough."""


@dataclass(frozen=True)
class Row:
    """Token ids [T] and the numbers of the documents they come from.

    A `whole` row is the beginning of one long document, a `packed` one holds several, a `further`
    one is a later window of a long document.
    """

    ids: array[int]
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


def looks_like_padding(ids: array[int]) -> bool:
    """Tell whether more than half of the tokens equal the last one."""
    return len(ids) > 2 and ids.count(ids[-1]) > len(ids) // 2


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
    row = ids_of(())
    numbers: list[int] = []
    after = ids_of(separator)
    for document in documents:
        rest = document.body + after
        begins = True
        while rest:
            if begins or not row:
                row += ids_of(document.prefix)
                begins = False
            room = seqlen - len(row)
            if room > 0:
                row += rest[:room]
                rest = rest[room:]
                numbers.append(document.number)
            if len(row) >= seqlen:
                yield Row(row[:seqlen], tuple(dict.fromkeys(numbers)), "packed")
                row, numbers = ids_of(()), []


def _further(documents: Sequence[Encoded], had: Sequence[int], seqlen: int) -> Iterator[Row]:
    counts = [document.windows(seqlen) for document in documents]
    for index in range(min(had, default=0), max(counts, default=0)):
        for document, first, count in zip(documents, had, counts, strict=True):
            if first <= index < count:
                yield Row(document.window(index, seqlen), (document.number,), "further")
