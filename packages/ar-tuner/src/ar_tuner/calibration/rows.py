"""Rows of calibration tokens from anything a user may give."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ar_tuner.calibration.packing import pack
from ar_tuner.calibration.sources import texts_of
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class CalibrationReport:
    """What the rows are made of, and how many were asked for."""

    asked: int
    rows: int
    seqlen: int
    packed: int = 0
    further: int = 0

    def notes(self) -> list[str]:
        """Return what the user should know: fewer rows than asked, or of another make."""
        out = []
        if self.packed or self.further:
            out.append(
                f"calibration: too few texts of {self.seqlen} tokens, so {self.packed} rows are "
                f"short texts joined and {self.further} are later parts of long ones"
            )
        if self.rows < self.asked:
            out.append(
                f"calibration: the data holds {self.rows} rows of {self.seqlen} tokens, fewer "
                f"than the {self.asked} asked for; give more text or a smaller seqlen"
            )
        return out


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

    Args:
        dataset: None (the embedded text), a file, a source's or a `datasets` name, a list of
            strings, token lists or token tensors, a tensor [N, T], or a DataLoader of these.
        tokenizer: turns text into ids; not needed for token data.
        nsamples: rows wanted.
        seqlen: tokens per row.
        seed: of the order in which texts are taken.
        allow_download: names may be looked up on the Hugging Face hub.

    Raises:
        TunerError: nothing to calibrate with, or text without a tokenizer.
    """
    if dataset is None or isinstance(dataset, (str, Path)):
        from ar_tuner.registry import datasets

        texts: Sequence[str] = texts_of(
            "default" if dataset is None else dataset, datasets(), allow_download=allow_download
        )
        return _from_texts(texts, tokenizer, nsamples, seqlen, seed)
    items = _items(dataset)
    if not items:
        msg = "the calibration set is empty: it holds no text and no tokens"
        raise TunerError(msg)
    if all(isinstance(item, str) for item in items):
        return _from_texts(items, tokenizer, nsamples, seqlen, seed)
    return _from_tokens(items, nsamples, seqlen)


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


def _from_texts(
    texts: Sequence[str], tokenizer: Any, nsamples: int, seqlen: int, seed: int
) -> tuple[Tensor, CalibrationReport]:
    if tokenizer is None:
        msg = "calibration text needs a tokenizer: give one, or give token tensors as dataset"
        raise TunerError(msg)
    order = list(texts)
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, not a secret

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, verbose=False).input_ids
        return ids

    separator = getattr(tokenizer, "eos_token_id", None)
    packed = pack(order, tokenize, rows=nsamples, seqlen=seqlen, separator=separator)
    if not packed.rows:
        msg = (
            f"the calibration set is too small: all its {len(order)} texts together hold fewer "
            f"than seqlen {seqlen} tokens. Give more text or a smaller seqlen."
        )
        raise TunerError(msg)
    report = CalibrationReport(nsamples, len(packed.rows), seqlen, packed.packed, packed.further)
    return torch.tensor(packed.rows, dtype=torch.int64), report


def _from_tokens(
    items: Sequence[Any], nsamples: int, seqlen: int
) -> tuple[Tensor, CalibrationReport]:
    rows: list[Tensor] = []
    for item in items:
        try:
            ids = torch.as_tensor(item).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            msg = f"calibration data of type {type(item).__name__} is neither text nor token ids"
            raise TunerError(msg) from error
        if ids.is_floating_point() or ids.ndim not in (1, 2):
            msg = (
                f"token ids must be whole numbers [T] or [N, T], not {ids.dtype} {list(ids.shape)}"
            )
            raise TunerError(msg)
        rows += list(ids.reshape(-1, ids.shape[-1]).to(torch.int64))
    if not rows:
        msg = "the calibration set is empty: it holds no text and no tokens"
        raise TunerError(msg)
    long_enough = [row[:seqlen] for row in rows if row.numel() >= seqlen]
    if not long_enough:  # token data is taken as it is: its common length is the row length
        seqlen = max(row.numel() for row in rows)
        long_enough = [row for row in rows if row.numel() == seqlen]
    kept = long_enough[:nsamples]
    return torch.stack(kept), CalibrationReport(nsamples, len(kept), seqlen)


def _items(dataset: Any) -> list[Any]:
    if isinstance(dataset, Tensor):
        return [dataset]
    try:
        iterator: Iterable[Any] = iter(dataset)
    except TypeError as error:
        msg = (
            f"dataset of type {type(dataset).__name__} is not understood: use a file, a name, a "
            "list of texts or token ids, or a DataLoader"
        )
        raise TunerError(msg) from error
    out: list[Any] = []
    for item in iterator:
        ids = _field(item, "input_ids")
        text = _field(item, "text")
        value = ids if ids is not None else text if text is not None else item
        out += value if isinstance(value, (list, tuple)) and _texts(value) else [value]
    return out


def _texts(value: Sequence[Any]) -> bool:
    return len(value) > 0 and all(isinstance(v, str) for v in value)


def _field(item: Any, name: str) -> Any:
    if isinstance(item, dict) or hasattr(item, "keys"):
        return item[name] if name in item else None  # noqa: SIM401 - BatchEncoding has no get
    return None
