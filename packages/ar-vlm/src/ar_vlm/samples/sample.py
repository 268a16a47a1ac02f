"""A sample: a plain text, or a chat whose messages hold texts and pictures in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ar_vlm.samples.pictures import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

Part: TypeAlias = str | Picture


@dataclass(frozen=True)
class Message:
    """What one side says: `system`, `user` or `assistant`."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Sample:
    """One calibration or evaluation sample.

    Attributes:
        messages: of a chat; empty for a plain text.
        text: a plain text; empty for a chat.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures, in the order in which they are spoken of."""
        return tuple(p for m in self.messages for p in m.parts if isinstance(p, Picture))

    def images(self) -> list[Image]:
        """Return the pictures as RGB images.

        Raises:
            VlmError: one of them cannot be read.
        """
        return [picture.open() for picture in self.pictures]

    def chat(self) -> list[dict[str, Any]]:
        """Return the messages in the form that chat templates of processors take."""
        return [
            {"role": m.role, "content": [_template_part(p) for p in m.parts]} for m in self.messages
        ]


def _template_part(part: Part) -> dict[str, str]:
    return {"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part}
