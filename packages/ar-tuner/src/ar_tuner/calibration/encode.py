"""Documents as token ids, with the tokens that a model expects before and between them."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ar_tuner.calibration.chat import Renderer
from ar_tuner.calibration.records import Tokens, ids_of
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator, Sequence

    from ar_tuner.calibration.chat import Way
    from ar_tuner.calibration.grammar import SetRequest
    from ar_tuner.calibration.records import Document

BATCH = 32


@dataclass(frozen=True)
class Encoded:
    """One document.

    Attributes:
        number: the same for equal documents, of whatever set.
        index: its place in the set.
        prefix: tokens that every row with a part of it at the front begins with (BOS, or none).
        body: its token ids [T], without prefix.
        cut: the text goes on behind what was encoded.
    """

    number: int
    index: int
    prefix: tuple[int, ...]
    body: array[int]
    cut: bool = False

    def windows(self, seqlen: int) -> int:
        """Return how many rows of `seqlen` tokens it fills."""
        return len(self.body) // (seqlen - len(self.prefix))

    def window(self, index: int, seqlen: int) -> array[int]:
        """Return one of these rows; they do not overlap."""
        room = seqlen - len(self.prefix)
        return ids_of(self.prefix) + self.body[index * room : (index + 1) * room]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and what it puts around a text.

    Attributes:
        prefix: tokens it puts before every text.
        separator: tokens between documents in a row: those it puts after a text, else the
            end-of-text token, else none.
        numbers: documents seen so far, by digest.
    """

    tokenizer: Any
    prefix: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()
    numbers: dict[bytes, int] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any, *, seqlen: int) -> Encoder:
        """Return the encoder of a tokenizer, or of none for data that is tokens already.

        Raises:
            TunerError: a row has no room beside the tokens before it.
        """
        if tokenizer is None:
            return cls(None)
        bare = list(tokenizer(["a"], add_special_tokens=False, verbose=False).input_ids[0])
        full = list(tokenizer(["a"], verbose=False).input_ids[0])
        starts = [i for i in range(len(full)) if bare and full[i : i + len(bare)] == bare]
        before = tuple(full[: starts[0]]) if starts else ()
        after = tuple(full[starts[0] + len(bare) :]) if starts else ()
        if len(before) >= seqlen:
            msg = f"seqlen {seqlen} leaves no room beside the {len(before)} tokens before a text"
            raise TunerError(msg)
        end = getattr(tokenizer, "eos_token_id", None)
        return cls(tokenizer, before, after or (() if end is None else (int(end),)))

    def number(self, content: bytes) -> int:
        """Return the number of a document, the next free one for a new document."""
        digest = hashlib.blake2b(content, digest_size=16).digest()
        return self.numbers.setdefault(digest, len(self.numbers))

    def ids(self, texts: Sequence[str]) -> list[array[int]]:
        """Return the token ids of texts, without special tokens around them."""
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return [ids_of(ids) for ids in found]


class SetEncoder:
    """The documents of one set on their way to token ids.

    Attributes:
        seen: documents encoded, duplicates not counted.
        duplicates: documents left out because an equal one came before in the set.
        ways: how many of them became text in which way.
    """

    def __init__(
        self, request: SetRequest, documents: Sequence[Document], encoder: Encoder
    ) -> None:
        if encoder.tokenizer is None and any(not isinstance(d, Tokens) for d in documents):
            msg = "calibration text needs a tokenizer: give one, or give token tensors as dataset"
            raise TunerError(msg)
        self.encoder = encoder
        self.seen = self.duplicates = 0
        self.ways: Counter[Way] = Counter()
        self._documents = documents
        self._render = Renderer.of(request, encoder.tokenizer)

    def __len__(self) -> int:
        """Return the number of documents, duplicates included."""
        return len(self._documents)

    def encoded(self, characters: int) -> Iterator[Encoded]:
        """Yield every document once, encoded up to so many characters."""
        met: set[int] = set()
        for start in range(0, len(self._documents), BATCH):
            batch = []
            for index in range(start, min(start + BATCH, len(self._documents))):
                draft = self._draft(index)
                if draft.number in met:
                    self.duplicates += 1
                    continue
                met.add(draft.number)
                batch.append(draft)
                if draft.way is not None:
                    self.ways[draft.way] += 1
            self.seen += len(batch)
            yield from self._encode(batch, characters)

    def again(self, document: Encoded, characters: int) -> Encoded:
        """Return a document encoded further than before."""
        return self._encode([self._draft(document.index)], characters)[0]

    def _draft(self, index: int) -> _Draft:
        document = self._documents[index]
        if isinstance(document, Tokens):
            content = b"tokens" + document.ids.tobytes()
            return _Draft(index, self.encoder.number(content), document.ids, None)
        text, way = self._render(document)
        content = text.encode("utf-8", "replace")  # half a surrogate pair has no code in UTF-8
        return _Draft(index, self.encoder.number(content), content.decode(), way)

    def _encode(self, drafts: Sequence[_Draft], characters: int) -> list[Encoded]:
        texts = [_clipped(d.content, characters) for d in drafts if isinstance(d.content, str)]
        encoded = iter(self.encoder.ids(texts) if texts else [])
        before = self.encoder.prefix
        out = []
        for draft in drafts:
            cut = isinstance(draft.content, str) and len(draft.content) > characters
            body = next(encoded) if isinstance(draft.content, str) else draft.content
            starts = bool(before) and tuple(body[: len(before)]) == before
            if starts:  # a template writes the tokens before a text itself; so may token data
                body = body[len(before) :]
            prefix = before if starts or draft.way not in ("chat", None) else ()
            out.append(Encoded(draft.number, draft.index, prefix, body, cut))
        return out


@dataclass(frozen=True)
class _Draft:
    index: int
    number: int
    content: str | array[int]
    way: Way | None


def _clipped(text: str, characters: int) -> str:
    """Return the beginning of a text up to a blank, so that no word is halved."""
    if len(text) <= characters:
        return text
    end = max(text.rfind(" ", 0, characters + 1), text.rfind("\n", 0, characters + 1))
    return text[: end if end > characters // 2 else characters]
