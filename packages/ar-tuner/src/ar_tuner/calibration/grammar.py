"""The words in which a user names calibration data: sets, their options, combinations of sets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ar_schemes import unknown_name
from ar_tuner.errors import TunerError

OPTIONS = ("split", "num", "concat", "apply_chat_template", "system_prompt", "key", "subset")
_FLAGS = {"": True, "true": True, "1": True, "false": False, "0": False}
_QUOTES = "\"'"


@dataclass(frozen=True)
class SetRequest:
    """One set of a request.

    Attributes:
        name: a file, a directory, a registered name or one on a hub.
        splits: parts of the set that are used; empty: what the set has by default.
        num: rows taken from it; None: an equal share of what other sets leave.
        concat: join all documents and cut the stream, instead of taking beginnings first.
        chat: go through the chat template; None: chats do, where the tokenizer has a template.
        system_prompt: first message of every chat.
        key: field of a record that holds the text, the messages or the token ids.
        subset: configuration of a set on a hub.
    """

    name: str
    splits: tuple[str, ...] = ()
    num: int | None = None
    concat: bool = False
    chat: bool | None = None
    system_prompt: str | None = None
    key: str | None = None
    subset: str | None = None

    @property
    def label(self) -> str:
        """How reports call the set: its name, and the splits where some were chosen."""
        return f"{self.name}:split={'+'.join(self.splits)}" if self.splits else self.name


def parse_sets(text: str) -> tuple[SetRequest, ...]:
    """Return the sets of `NAME[:option[=value]]...[,NAME...]`.

    A comma or colon inside quotes that open a name or a value separates nothing; nor does the
    colon of a Windows drive.

    Raises:
        TunerError: a set without a name, an unknown or doubled option, a value out of range.
    """
    return tuple(_parse_set(piece.strip(), text) for piece in _cut(text, ","))


def _parse_set(piece: str, text: str) -> SetRequest:
    name, *options = _cut(piece, ":")
    if options and len(name) == 1 and name.isalpha() and options[0][:1] in ("\\", "/"):
        name = f"{name}:{options.pop(0)}"
    name = _unquoted(name.strip())
    if not name:
        msg = f"dataset {text!r}: a set has no name. Write NAME:option=value, sets separated by ','"
        raise TunerError(msg)
    if name.partition("=")[0] in OPTIONS:
        msg = (
            f"dataset {text!r}: {name!r} stands where a set should be named. Options are separated "
            "by ':', sets by ','; put a value that holds either in quotes."
        )
        raise TunerError(msg)
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        key = key.strip()
        if key not in OPTIONS:
            hint = "Put a name or a value that holds ':' in quotes."
            raise TunerError(unknown_name("dataset option", key, OPTIONS, hint=hint))
        if key in given:
            msg = f"dataset {text!r}: {key} is given twice for {name}"
            raise TunerError(msg)
        given[key] = _value(key, _unquoted(value) if equals else None, name)
    return _request(name, given)


def _request(name: str, given: dict[str, Any]) -> SetRequest:
    prompt, chat = given.get("system_prompt"), given.get("apply_chat_template")
    if prompt is not None and chat is False:
        msg = f"dataset {name}: system_prompt needs the chat template that is switched off"
        raise TunerError(msg)
    request = SetRequest(
        name=name,
        splits=given.get("split", ()),
        num=given.get("num"),
        concat=given.get("concat", False),
        chat=True if prompt is not None else chat,
        system_prompt=prompt or None,
    )
    return dataclasses.replace(request, key=given.get("key"), subset=given.get("subset"))


def _value(key: str, value: str | None, name: str) -> Any:
    if key in ("concat", "apply_chat_template"):
        flag = _FLAGS.get((value or "").strip().lower())
        if flag is not None:
            return flag
        expected = "true or false, or nothing"
    elif key == "num":
        if value is not None and value.strip().isdecimal() and int(value) > 0:
            return int(value)
        expected = "a whole number of at least 1"
    elif key == "split":
        parts = tuple(part.strip() for part in (value or "").split("+"))
        if all(parts):
            return parts
        expected = "names joined by '+', such as train+validation"
    else:
        if value or (key == "system_prompt" and value is not None):
            return value
        expected = "a value"
    msg = f"dataset {name}: {key}={'' if value is None else value} is not allowed: use {expected}"
    raise TunerError(msg)


def _cut(text: str, mark: str) -> list[str]:
    parts, start, quote = [], 0, ""
    for at, sign in enumerate(text):
        if quote:
            if sign == quote and text[at + 1 : at + 2] in ("", ":", ","):
                quote = ""
        elif sign in _QUOTES and text[at - 1 : at] in ("", "=", ":", ",", " "):
            quote = sign
        elif sign == mark:
            parts.append(text[start:at])
            start = at + 1
    if quote:
        msg = (
            f"dataset {text!r}: a quote {quote} is opened and not closed before ':', ',' or the end"
        )
        raise TunerError(msg)
    return [*parts, text[start:]]


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] in _QUOTES and text[-1] == text[0] else text
