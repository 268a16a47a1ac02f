"""A sample's text, with a mark where each image belongs: through the model's chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ar_vlm.samples.pictures import Picture

if TYPE_CHECKING:
    from ar_vlm.samples.sample import Message, Part, Sample

Way: TypeAlias = Literal["text", "chat", "untemplated", "refused", "given"]
"""How a sample became text: it was text; through the template; as plain contents for want of a
template, or because the template does not take it; by the user's own function."""


def rendered(sample: Sample, processor: Any) -> tuple[str, Way]:
    """Return the text of a sample, and how it came about.

    Templates that know no parts of messages get contents of text with the marks in them.
    """
    if not sample.messages:
        return sample.text, "text"
    mark = mark_of(processor)
    template = getattr(processor, "chat_template", None) or getattr(
        processor.tokenizer, "chat_template", None
    )
    if not template:
        return _plain(sample, mark), "untemplated"
    wanted = len(sample.pictures)
    flat = [{"role": m.role, "content": _flat(m, mark)} for m in sample.messages]
    for messages in (sample.chat(), flat):
        text = _applied(processor, template, messages)
        if text is not None and _fits(text, sample, mark, wanted):
            return text, "chat"
    return _plain(sample, mark), "refused"


def mark_of(processor: Any) -> str:
    """Return what stands for an image in a text before it is expanded."""
    names = (processor, processor.tokenizer)
    found = (getattr(owner, "image_token", None) for owner in names)
    return next((m for m in found if isinstance(m, str)), "<image>")


def _applied(processor: Any, template: Any, messages: list[dict[str, Any]]) -> str | None:
    from jinja2 import TemplateError

    waits = messages[-1]["role"] != "assistant"
    try:
        text: str = processor.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=waits
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return None  # the caller has another form, and tells when none is taken
    return text


def _fits(text: str, sample: Sample, mark: str, wanted: int) -> bool:
    """Tell whether a template has put every image and every text in its place."""
    words = [p.strip() for m in sample.messages for p in m.parts if isinstance(p, str)]
    return text.count(mark) == wanted and all(w in text for w in words) and "'type':" not in text


def _plain(sample: Sample, mark: str) -> str:
    return "\n".join(f"{m.role}: {_flat(m, mark)}" for m in sample.messages)


def _flat(message: Message, mark: str) -> str:
    return "".join(_word(part, mark) for part in message.parts)


def _word(part: Part, mark: str) -> str:
    return mark if isinstance(part, Picture) else part
