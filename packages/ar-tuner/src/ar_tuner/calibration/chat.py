"""Chats as the model is used with them: through the tokenizer's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ar_tuner.calibration.records import Chat
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from ar_tuner.calibration.grammar import SetRequest

Way: TypeAlias = Literal["text", "chat", "plain", "untemplated", "refused"]
"""How a document became text: it was text; through the template; as plain contents because that was
asked for, because there is no template, or because the template does not take it."""


@dataclass(frozen=True)
class Renderer:
    """Turns documents of one set into text."""

    request: SetRequest
    tokenizer: Any
    has_template: bool

    @classmethod
    def of(cls, request: SetRequest, tokenizer: Any) -> Renderer:
        """Return the renderer of a set.

        Raises:
            TunerError: the template is asked for and the tokenizer has none.
        """
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if request.chat and not has_template:
            msg = (
                f"dataset {request.label}: apply_chat_template is asked for, but the tokenizer has "
                "no chat template. Use the tokenizer of a chat model, or leave the option out."
            )
            raise TunerError(msg)
        return cls(request, tokenizer, has_template)

    def __call__(self, document: str | Chat) -> tuple[str, Way]:
        """Return the text of a document, and how it came about.

        Plain text is a user's message where the template is asked for.

        Raises:
            TunerError: the template was asked for and does not take the document.
        """
        if isinstance(document, str):
            if not self.request.chat:
                return document, "text"
            document = Chat((("user", document),))
        if self.request.chat is False:
            return document.plain, "plain"
        if not self.has_template:
            return document.plain, "untemplated"
        return self._templated(document)

    def _templated(self, chat: Chat) -> tuple[str, Way]:
        messages = [{"role": role, "content": content} for role, content in chat.messages]
        prompt = self.request.system_prompt
        if prompt is not None:
            messages = [m for m in messages if m["role"] != "system"]
            messages.insert(0, {"role": "system", "content": prompt})
        merged = None if prompt is not None else _without_system(messages)
        refusals: list[Exception] = []
        for attempt in [messages] if merged is None else [messages, merged]:
            try:
                return self._apply(attempt), "chat"
            except Exception as error:  # noqa: BLE001 - a template is a program of its own
                refusals.append(error)
        if self.request.chat:
            reason = str(refusals[0]).strip().partition("\n")[0] or type(refusals[0]).__name__
            what = "one of the chats" if prompt is None else "a chat with this system_prompt"
            msg = (
                f"dataset {self.request.label}: the tokenizer's chat template does not take "
                f"{what}: {reason}"
            )
            raise TunerError(msg) from refusals[0]
        return chat.plain, "refused"

    def _apply(self, messages: list[dict[str, str]]) -> str:
        waits = messages[-1]["role"] != "assistant"
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=waits
        )
        return text


def _without_system(messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """Return the messages with the system's words at the head of the user's, or None."""
    if [m["role"] for m in messages[:2]] != ["system", "user"]:
        return None
    joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": joined}, *messages[2:]]
