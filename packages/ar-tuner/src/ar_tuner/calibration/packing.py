"""Rows of equal length from texts of any length: long ones cut, short ones packed, none padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Packed:
    """Rows of token ids and what they are made of.

    `whole` rows are the beginning of one long text, `packed` hold several short ones, `further`
    are later windows of long texts.
    """

    rows: list[list[int]]
    whole: int
    packed: int
    further: int


def pack(
    texts: Sequence[str],
    tokenize: Callable[[str], list[int]],
    *,
    rows: int,
    seqlen: int,
    separator: int | None,
) -> Packed:
    """Return up to `rows` rows of `seqlen` tokens, texts taken in the order given.

    The beginnings of long texts come first, as the reference implementation takes them; where
    they do not suffice, short texts joined by the separator, then later windows of long texts.
    """
    whole: list[list[int]] = []
    short: list[list[int]] = []
    windows: list[list[int]] = []
    for text in texts:
        ids = tokenize(text)
        if len(ids) >= seqlen:
            whole.append(ids[:seqlen])
            windows += [ids[i : i + seqlen] for i in range(seqlen, len(ids) - seqlen + 1, seqlen)]
            if len(whole) == rows:
                return Packed(whole, rows, 0, 0)
        elif ids:
            short.append(ids)
    joined = _joined(short, seqlen, separator)[: rows - len(whole)]
    further = windows[: rows - len(whole) - len(joined)]
    return Packed(whole + joined + further, len(whole), len(joined), len(further))


def _joined(texts: Sequence[list[int]], seqlen: int, separator: int | None) -> list[list[int]]:
    stream: list[int] = []
    for ids in texts:
        stream += ids
        if separator is not None:
            stream.append(separator)
    return [stream[i : i + seqlen] for i in range(0, len(stream) - seqlen + 1, seqlen)]
