"""Where calibration records come from: files, registered names, names on a hub."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ar_schemes import unknown_name
from ar_tuner.calibration.files import SUFFIXES, is_local, read_path
from ar_tuner.calibration.records import document_of, is_empty, size_of
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ar_tuner.calibration.grammar import SetRequest
    from ar_tuner.calibration.records import Document

POOL_CHARACTERS = 2**27
"""Most text that is kept of one set while rows are chosen."""


@dataclass(frozen=True)
class Query:
    """What a source is asked for.

    Attributes:
        splits: parts of the set; empty: those it has by default.
        subset: configuration of a set on a hub, or None.
        key: field of a record that is meant, or None.
        seed: of the order of a stream too long to be read whole.
        limit: records of which a stream too long to be read whole gives no more.
        allow_download: the network may be used.
    """

    splits: tuple[str, ...] = ()
    subset: str | None = None
    key: str | None = None
    seed: int = 42
    limit: int = 10_000
    allow_download: bool = False


@runtime_checkable
class DatasetSource(Protocol):
    """A named source of calibration data.

    It may have `aliases`, a tuple of other names, which may hold what a name may not ("/").
    """

    @property
    def name(self) -> str:
        """What a user types."""

    def records(self, query: Query) -> Iterable[Any]:
        """Return records: strings, dicts with text, chat messages, or token ids.

        Equal queries get equal records in equal order. What cannot be answered (an unknown split,
        no consent to download) is refused by the call itself; records are read while iterating.

        Raises:
            TunerError: the query cannot be answered.
        """


class EmbeddedTexts:
    """Source `default`: plain English prose and code that ships with ar-tuner."""

    name = "default"

    def records(self, query: Query) -> Iterable[Any]:
        """Return the texts."""
        return read_path(Path(__file__).with_name("default.jsonl"), splits=query.splits)


def open_set(
    request: SetRequest, known: Mapping[str, DatasetSource], query: Query
) -> Iterator[Document]:
    """Return the documents of a set, read while iterating; empty ones are left out.

    A registered name comes before a file of that name; names are compared whole.

    Raises:
        TunerError: no such file, source or split, or no consent to download.
    """
    records: Iterable[Any]
    named = _find(request.name, known)
    if named is not None:
        records = named.records(query)
    elif is_local(request.name):
        records = read_path(Path(request.name), splits=query.splits)
    elif query.allow_download:
        from ar_tuner.calibration.hub import HubSet, Place

        splits = query.splits or ("train",)
        records = HubSet(request.name, hub=Place(request.name, splits)).records(query)
    else:
        hint = (
            f"A local file ends in {', '.join(SUFFIXES)}. To load a set by its name from "
            "the Hugging Face hub, allow downloads (--allow-download)."
        )
        raise TunerError(unknown_name("calibration dataset", request.name, known, hint=hint))
    return documents_of(records, where=request.name, key=request.key)


def _find(name: str, known: Mapping[str, DatasetSource]) -> DatasetSource | None:
    if name in known:
        return known[name]
    aliased = (source for source in known.values() if name in getattr(source, "aliases", ()))
    return next(aliased, None)


def documents_of(
    records: Iterable[Any], *, where: str, key: str | None = None
) -> Iterator[Document]:
    """Yield what records hold, without the empty ones.

    Raises:
        TunerError: a record that holds neither text, nor a chat, nor token ids.
    """
    for record in records:
        document = document_of(record, where=where, key=key)
        if not is_empty(document):
            yield document


def sample(
    documents: Iterable[Document], *, limit: int, seed: int, characters: int = POOL_CHARACTERS
) -> list[Document]:
    """Return at most `limit` documents of about `characters` in all, every one equally likely.

    Where all fit they come in their own order; else it is reservoir sampling (Vitter 1985,
    algorithm R), which keeps no more than it returns.
    """
    chance = random.Random(seed)  # noqa: S311 - a choice, not a secret
    kept: list[Document] = []
    held = 0
    for seen, document in enumerate(documents):
        size = size_of(document)
        if len(kept) < limit:
            kept.append(document)
            held += size
        elif (at := chance.randrange(seen + 1)) < limit:
            held += size - size_of(kept[at])
            kept[at] = document
        while held > characters and len(kept) > 1:
            held -= size_of(kept.pop(chance.randrange(len(kept))))
            limit = len(kept)
    return kept
