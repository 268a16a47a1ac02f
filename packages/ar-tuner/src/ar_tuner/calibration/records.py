"""What a record of calibration data is: a text, a chat or token ids."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TEXT_KEYS = ("text", "content")
CHAT_KEYS = ("messages", "conversations", "conversation")
PAIRS = (
    (("instruction", "input"), "output"),
    (("instruction",), "response"),
    (("prompt",), "response"),
    (("prompt",), "completion"),
    (("question",), "answer"),
    (("query",), "response"),
    (("input",), "output"),
)
"""Fields of a request and of the answer to it, tried in this order."""
LAST_KEYS = ("prompt", "instruction", "question", "query", "input", "code")
"""Fields that are taken as text where a record has nothing better."""
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Chat:
    """Messages as (role, content), roles named `system`, `user`, `assistant` where known."""

    messages: tuple[tuple[str, str], ...]

    @property
    def plain(self) -> str:
        """The contents, one after the other."""
        return "\n\n".join(content for _, content in self.messages if content)


@dataclass(frozen=True)
class Tokens:
    """Token ids [T] as they were given."""

    ids: array[int]


Document: TypeAlias = str | Chat | Tokens


def size_of(document: Document) -> int:
    """Return about how many characters a document holds."""
    if isinstance(document, str):
        return len(document)
    if isinstance(document, Chat):
        return sum(len(content) for _, content in document.messages)
    return 4 * len(document.ids)


def is_empty(document: Document) -> bool:
    """Tell whether a document holds nothing but blanks."""
    if isinstance(document, Tokens):
        return not document.ids
    return not (document if isinstance(document, str) else document.plain).strip()


def document_of(record: Any, *, where: str, key: str | None = None) -> Document:
    """Return what one record holds; `key` names the field that is meant.

    Raises:
        TunerError: neither text, nor a chat, nor token ids.
    """
    value = record
    if key is not None:
        value = record.get(key) if isinstance(record, Mapping) else None
        if isinstance(value, Mapping):
            value = None
    found = _of_mapping(value, where) if isinstance(value, Mapping) else _of_value(value, where)
    if found is not None:
        return found
    fields = ", ".join(map(str, record)) if isinstance(record, Mapping) else ""
    what = (
        f"a record with the fields {fields}" if fields else f"data of type {type(record).__name__}"
    )
    asked = "" if key is None else f" in the field {key!r} asked for"
    msg = (
        f"{where}: {what} holds no text{asked}. Use strings, or records with one of the fields "
        f"{', '.join((*TEXT_KEYS, *CHAT_KEYS, *LAST_KEYS, 'input_ids'))}; or name the field with "
        "':key=NAME'."
    )
    raise TunerError(msg)


def ids_of(values: Iterable[int]) -> array[int]:
    """Return token ids in 4 bytes each."""
    return array("i", values)


def token_ids(value: Any) -> Tensor:
    """Return token ids [T] or [N, T] of a list, array or tensor.

    Raises:
        TunerError: not whole numbers of 32 bits in one or two dimensions.
    """
    try:
        ids = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"calibration data of type {type(value).__name__} is neither text nor token ids"
        raise TunerError(msg) from error
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.numel() and (not whole or ids.ndim not in (1, 2) or int(ids.abs().max()) >= 2**31):
        msg = (
            "token ids must be whole numbers of 32 bits in [T] or [N, T], "
            f"not {ids.dtype} {list(ids.shape)}"
        )
        raise TunerError(msg)
    return ids


def _of_mapping(record: Mapping[str, Any], where: str) -> Document | None:
    if record.get("input_ids") is not None:
        ids = token_ids(record["input_ids"]).reshape(-1)
        mask = record.get("attention_mask")
        kept = ids if mask is None else ids[token_ids(mask).reshape(-1) != 0]
        return Tokens(ids_of(kept.tolist()))
    for name in TEXT_KEYS:
        if isinstance(record.get(name), str):
            return str(record[name])
    system = record.get("system")
    for name in CHAT_KEYS:
        if isinstance(record.get(name), (list, tuple)):
            return _chat(record[name], where, system)
    for asked, answer in PAIRS:
        if isinstance(record.get(answer), str) and isinstance(record.get(asked[0]), str):
            return pair_of(record, asked, answer)
    return next((str(record[k]) for k in LAST_KEYS if isinstance(record.get(k), str)), None)


def pair_of(record: Mapping[str, Any], asked: Sequence[str], answer: str) -> Chat:
    """Return a request (one or several fields) and its answer as a chat."""
    question = "\n\n".join(str(record[k]) for k in asked if record.get(k))
    messages = [("user", question), ("assistant", str(record[answer]))]
    if isinstance(record.get("system"), str) and record["system"]:
        messages.insert(0, ("system", record["system"]))
    return Chat(tuple(messages))


def _of_value(value: Any, where: str) -> Document | None:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Mapping) for v in value):
        return _chat(value, where, None)
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], int):
        return None
    if isinstance(value, (list, tuple)) or hasattr(value, "shape"):  # tensors and arrays have one
        return Tokens(ids_of(token_ids(value).reshape(-1).tolist()))
    return None


def _chat(messages: Sequence[Any], where: str, system: Any) -> Chat:
    out = [_message(message, where) for message in messages]
    if isinstance(system, str) and system and (not out or out[0][0] != "system"):
        out.insert(0, ("system", system))
    return Chat(tuple(out))


def _message(message: Any, where: str) -> tuple[str, str]:
    role = content = None
    if isinstance(message, Mapping):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
    if isinstance(content, (list, tuple)):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "\n".join(texts) if len(texts) == len(parts) else parts
    if not isinstance(role, str) or not (content is None or isinstance(content, str)):
        shown = repr(message)
        msg = (
            f"{where}: {shown[:80]}{'...' if len(shown) > 80 else ''} is no message of a chat: it "
            "needs a role (or from) and a content (or value) of text"
        )
        raise TunerError(msg)
    return ROLES.get(role, role), content or ""
