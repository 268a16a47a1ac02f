"""Rows of calibration tokens from anything a user may give."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.calibration.encode import Encoder, SetEncoder
from ar_tuner.calibration.files import is_file
from ar_tuner.calibration.given import given_documents
from ar_tuner.calibration.grammar import SetRequest, parse_sets
from ar_tuner.calibration.packing import Sieve, looks_like_padding, rows_of
from ar_tuner.calibration.records import Tokens
from ar_tuner.calibration.report import CalibrationReport, SetReport
from ar_tuner.calibration.shares import draw, shares
from ar_tuner.calibration.sources import Query, open_set, sample
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from ar_tuner.calibration.packing import Row
    from ar_tuner.calibration.records import Document

LEAST_POOL = 10_000
"""Documents that rows are chosen from, of a set that has as many."""


@dataclass(frozen=True)
class _Wish:
    """How many rows of how many tokens, in which order."""

    rows: int
    seqlen: int
    seed: int

    @property
    def pool(self) -> int:
        """Documents to choose from, enough even if they are a few tokens long."""
        return max(LEAST_POOL, self.rows * self.seqlen // 16)


def calibration_rows(
    dataset: Any,
    tokenizer: Any,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    allow_download: bool = False,
) -> tuple[Tensor, CalibrationReport]:
    """Return token ids [N, T] of at most `nsamples` rows, and what they are made of.

    Rows of equal length that are given as tokens and no longer than `seqlen` are used as they are.
    Of everything else duplicates are left out, and rows that are mostly one token.

    Args:
        dataset: None (the embedded text); a path; sets as `parse_sets` reads them; a list of
            strings, records, token lists or token tensors; a tensor [N, T]; a DataLoader of these.
        tokenizer: turns text into ids; not needed for token data.
        nsamples: rows wanted.
        seqlen: tokens per row.
        seed: of the order in which documents are taken; tokens are taken in their own order.
        allow_download: names may be looked up on a hub.

    Raises:
        TunerError: nothing to calibrate with, or text without a tokenizer.
    """
    wish = _Wish(nsamples, seqlen, seed)
    requests = requests_of(dataset)
    if requests is None:
        requests = (SetRequest("dataset"),)
        pools = [_given(dataset, wish)]
        if _is_ready(pools[0], seqlen):
            return _ready(pools[0], nsamples)
    else:
        opened = [_open(request, seed, wish.pool, allow_download) for request in requests]
        pools = [_shuffled(sample(o, limit=wish.pool, seed=seed), seed) for o in opened]
    return _rows(requests, pools, tokenizer, wish)


def check_dataset(dataset: Any, *, nsamples: int | None, allow_download: bool) -> None:
    """Refuse a request that names what is not there, before anything is read.

    `nsamples` is None where no rows will be drawn.

    Raises:
        TunerError: see `parse_sets`, `open_set` and `shares`.
    """
    requests = requests_of(dataset)
    for request in requests or ():
        _open(request, 0, LEAST_POOL, allow_download)
    if requests and nsamples is not None:
        shares(requests, nsamples)


def requests_of(dataset: Any) -> tuple[SetRequest, ...] | None:
    """Return the sets that a user names, or None where the data itself is given.

    A path, and a string that is the whole name of a file that is there, is that file.
    """
    if dataset is None:
        return (SetRequest("default"),)
    if isinstance(dataset, Path):  # never a registered name
        return (SetRequest(str(dataset) if dataset.is_absolute() else f"./{dataset}"),)
    if isinstance(dataset, str) and is_file(dataset):
        return (SetRequest(dataset),)
    if isinstance(dataset, tuple) and dataset and isinstance(dataset[0], SetRequest):
        return dataset
    return parse_sets(dataset) if isinstance(dataset, str) else None


def check_seqlen(seqlen: int, config: Any, *, asked: bool) -> int:
    """Return the length of a row that the model can take.

    Raises:
        TunerError: the user asked for more than the model's position limit.
    """
    text = getattr(config, "text_config", None) or config
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if not isinstance(limit, int) or limit < 2 or seqlen <= limit:  # noqa: PLR2004
        return seqlen
    if asked:
        msg = f"seqlen {seqlen} is more than the model's {limit} positions: use at most {limit}"
        raise TunerError(msg)
    return limit


def check_ids(rows: Tensor, config: Any) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        TunerError: an id below 0 or not below the vocabulary's size.
    """
    size = getattr(getattr(config, "text_config", None) or config, "vocab_size", None)
    least, most = int(rows.min()), int(rows.max())
    if least < 0 or (isinstance(size, int) and most >= size):
        wrong = least if least < 0 else most
        msg = (
            f"calibration token id {wrong} is outside the model's vocabulary of {size} tokens: "
            "use the tokenizer that belongs to the model"
        )
        raise TunerError(msg)


def _open(
    request: SetRequest,
    seed: int,
    limit: int,
    allow_download: bool,  # noqa: FBT001
) -> Iterator[Document]:
    from ar_tuner.registry import datasets

    query = Query(request.splits, request.subset, request.key, seed, limit, allow_download)
    return open_set(request, datasets(), query)


def _shuffled(documents: list[Document], seed: int) -> list[Document]:
    random.Random(seed).shuffle(documents)  # noqa: S311 - an order, not a secret
    return documents


def _given(dataset: Any, wish: _Wish) -> list[Document]:
    documents = given_documents(dataset)
    first = next(documents, None)
    if first is None:
        return []
    everything: Iterator[Document] = itertools.chain([first], documents)
    if isinstance(first, Tokens):  # tokens keep their order
        return list(itertools.islice(everything, wish.pool))
    if not hasattr(dataset, "__len__"):  # there may be no end to it
        everything = itertools.islice(everything, wish.pool)
    return _shuffled(sample(everything, limit=wish.pool, seed=wish.seed), wish.seed)


def _is_ready(documents: Sequence[Document], seqlen: int) -> bool:
    """Tell whether documents are rows already: tokens of one length that fits."""
    lengths = {len(d.ids) if isinstance(d, Tokens) else -1 for d in documents}
    return len(lengths) == 1 and 0 < min(lengths) <= seqlen


def _ready(documents: Sequence[Document], nsamples: int) -> tuple[Tensor, CalibrationReport]:
    ids = [d.ids for d in documents[:nsamples] if isinstance(d, Tokens)]
    rows = _tensor(ids)
    numbers: dict[bytes, int] = {}
    made_of = tuple((numbers.setdefault(row.tobytes(), len(numbers)),) for row in ids)
    part = SetReport(
        label="dataset",
        asked=nsamples,
        rows=len(ids),
        documents=len(ids),
        duplicates=len(ids) - len(numbers),
        padding=sum(map(looks_like_padding, ids)),
        as_given=True,
    )
    return rows, CalibrationReport(nsamples, rows.shape[1], (part,), made_of)


def _rows(
    requests: Sequence[SetRequest],
    pools: Sequence[Sequence[Document]],
    tokenizer: Any,
    wish: _Wish,
) -> tuple[Tensor, CalibrationReport]:
    for request, pool in zip(requests, pools, strict=True):
        if not pool:
            msg = f"calibration dataset {request.name!r} is empty: it holds no text and no tokens"
            raise TunerError(msg)
    parts = shares(requests, wish.rows)
    encoder = Encoder.of(tokenizer, seqlen=wish.seqlen)
    sets = [SetEncoder(r, pool, encoder) for r, pool in zip(requests, pools, strict=True)]
    met: set[bytes] = set()
    sieves = [Sieve(met) for _ in sets]
    streams = [
        sieve(rows_of(part, seqlen=wish.seqlen, wanted=wish.rows, concat=request.concat))
        for sieve, part, request in zip(sieves, sets, requests, strict=True)
    ]
    drawn = draw(streams, parts, [request.num is None for request in requests])
    reports = tuple(map(_report, requests, parts, drawn, sets, sieves))
    rows = [row for group in drawn for row in group]
    if not rows:
        raise TunerError(_nothing(reports, wish.seqlen))
    if len(sets) > 1:
        random.Random(wish.seed).shuffle(rows)  # noqa: S311 - an order, not a secret
    ids = _tensor([row.ids for row in rows])
    made_of = tuple(row.documents for row in rows)
    return ids, CalibrationReport(sum(parts), wish.seqlen, reports, made_of)


def _tensor(rows: Sequence[array[int]]) -> Tensor:
    return torch.stack([torch.frombuffer(row, dtype=torch.int32) for row in rows]).to(torch.int64)


def _report(
    request: SetRequest, asked: int, rows: Sequence[Row], documents: SetEncoder, sieve: Sieve
) -> SetReport:
    return SetReport(
        label=request.label,
        num=request.num,
        asked=asked,
        rows=len(rows),
        packed=sum(row.kind == "packed" for row in rows),
        further=sum(row.kind == "further" for row in rows),
        documents=documents.seen,
        duplicates=documents.duplicates + sieve.duplicates,
        padding=sieve.padding,
        untemplated=documents.ways["untemplated"],
        refused=documents.ways["refused"],
    )


def _nothing(reports: Sequence[SetReport], seqlen: int) -> str:
    count = sum(report.documents for report in reports)
    padding = sum(report.padding for report in reports)
    if padding:
        return (
            f"the calibration set gives no row: more than half of each of its {padding} rows is "
            "one and the same token, as in padding. Give running text."
        )
    return (
        f"the calibration set is too small: all its {count} texts together hold fewer "
        f"than seqlen {seqlen} tokens. Give more text or a smaller seqlen."
    )
