"""What a record of image-text data says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ar_tuner.calibration.records import CHAT_KEYS, PAIRS, ROLES
from ar_vlm.errors import VlmError
from ar_vlm.samples.sample import Message, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ar_vlm.samples.pictures import Picture, Places
    from ar_vlm.samples.sample import Part

IMAGE_KEYS = ("image", "images", "image_path")
CAPTIONS = ("caption", "text", "answer", "output")
"""Fields that say something about the image where there is no question."""
PLACEHOLDER = re.compile(r"\s*<(image|video)>\s*")
"""Where LLaVA's texts have an image; blanks around it belong to the mark."""


def sample_of(record: Any, places: Places, *, where: str) -> Sample:
    """Return what one record holds.

    Raises:
        VlmError: neither a chat, nor text beside an image, nor plain text.
    """
    if isinstance(record, Sample):
        return record
    if isinstance(record, str):
        return Sample(text=record)
    if isinstance(record, (list, tuple)) and record and isinstance(record[0], Mapping):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        msg = f"{where}: data of type {type(record).__name__} is no sample"
        raise VlmError(msg)
    try:
        waiting = _Waiting(record, places)
        messages = _messages(record, waiting)
    except VlmError as error:
        msg = f"{where}: {error}"
        raise VlmError(msg) from error
    if messages:
        return Sample(waiting.placed(messages))
    text = next((record[k] for k in CAPTIONS if isinstance(record.get(k), str)), None)
    if text is None:
        fields = ", ".join(map(str, record))
        msg = (
            f"{where}: a record with the fields {fields} is no sample. Use {{'messages': [...]}}, "
            "{'image', 'conversations'}, {'image', 'question', 'answer'} or {'image', 'caption'}."
        )
        raise VlmError(msg)
    pictures = waiting.rest()
    if not pictures:
        return Sample(text=text)
    return Sample((Message("user", tuple(pictures)), Message("assistant", (text,))))


class _Waiting:
    """The images beside the messages of a record, until the text says where they belong."""

    def __init__(self, record: Mapping[str, Any], places: Places) -> None:
        self._places = places
        films = _several([record["video"]] if record.get("video") else record.get("videos"))
        self._films = [places.frames(film) for film in films]
        self._pictures = [places.picture(v) for k in IMAGE_KEYS for v in _several(record.get(k))]
        self._beside = bool(self._films or self._pictures)

    def next(self, kind: str) -> list[Picture]:
        """Return what the next mark in a text stands for."""
        waiting = self._films if kind == "video" else self._pictures
        if not waiting:
            msg = f"the text speaks of more {kind}s than there are"
            raise VlmError(msg)
        found = waiting.pop(0)
        return found if isinstance(found, list) else [found]

    def of_text(self, text: str) -> tuple[Part, ...]:
        """Return a text with images in the place of its marks, if the record has images."""
        if not self._beside:
            return (text,) if text else ()
        parts: list[Part] = []
        pieces = PLACEHOLDER.split(text)
        for piece, kind in zip(pieces[::2], [*pieces[1::2], None], strict=True):
            parts += [piece] if piece.strip() else []
            parts += self.next(kind) if kind else []
        return tuple(parts)

    def of_part(self, part: Any) -> list[Part]:
        """Return what one part of a content holds."""
        if isinstance(part, str):
            return [part]
        known = part if isinstance(part, Mapping) else {}
        kind = known.get("type") or next((k for k in ("text", "image", "video") if k in known), "")
        if kind in ("text", "input_text") and isinstance(known.get("text"), str):
            return [known["text"]] if known["text"] else []
        if kind in ("video", "input_video"):
            told = {k: known[k] for k in ("frames", "path", "video") if known.get(k) is not None}
            return [*(self._places.frames(told) if told else self.next("video"))]
        if kind in ("image", "image_url", "input_image"):
            named = [known[k] for k in ("image", "path", "image_url", "url") if known.get(k)]
            return [self._places.picture(named[0])] if named else [*self.next("image")]
        msg = f"a part of a message is not understood: {str(part)[:100]}"
        raise VlmError(msg)

    def rest(self) -> list[Picture]:
        """Return the images that no text speaks of."""
        return [*self._pictures, *(p for film in self._films for p in film)]

    def placed(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Return the messages with the images that none speaks of before the first question."""
        rest = self.rest()
        if not rest:
            return tuple(messages)
        at = next((i for i, m in enumerate(messages) if m.role == "user"), 0)
        first = Message(messages[at].role, (*rest, *messages[at].parts))
        return (*messages[:at], first, *messages[at + 1 :])


def _messages(record: Mapping[str, Any], waiting: _Waiting) -> list[Message]:
    for key in CHAT_KEYS:
        if isinstance(record.get(key), (list, tuple)):
            return [_message(m, waiting) for m in record[key]]
    for asked, answer in PAIRS:
        if isinstance(record.get(asked[0]), str) and isinstance(record.get(answer), str):
            question = "\n\n".join(str(record[k]) for k in asked if record.get(k))
            return [
                Message("user", waiting.of_text(question)),
                Message("assistant", (str(record[answer]),)),
            ]
    return []


def _message(message: Any, waiting: _Waiting) -> Message:
    role = content = None
    if isinstance(message, Mapping):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, (str, list, tuple)):
        msg = f"{str(message)[:80]!r} is no message: it needs a role and a content"
        raise VlmError(msg)
    role = ROLES.get(role, role)
    if isinstance(content, str):
        return Message(role, waiting.of_text(content))
    return Message(role, tuple(part for item in content for part in waiting.of_part(item)))


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
