"""What models do to the logits of their output head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def tail_of(config: Any) -> Callable[[Tensor], Tensor]:
    """Return the function that a model applies to the head's output, from its configuration.

    A factor (Cohere `logit_scale`, Granite `logits_scaling`, Falcon-H1 `lm_head_multiplier`), then
    a soft cap (Gemma `final_logit_softcapping`); the identity for all others.
    """
    getter = getattr(config, "get_text_config", None)
    text = getter(decoder=True) if callable(getter) else config
    factor = _number(text, "logit_scale", 1.0) * _number(text, "lm_head_multiplier", 1.0)
    factor /= _number(text, "logits_scaling", 1.0)
    cap = _number(text, "final_logit_softcapping", 0.0)

    def tail(logits: Tensor) -> Tensor:
        scaled = logits if factor == 1.0 else logits * factor
        return torch.tanh(scaled / cap) * cap if cap else scaled

    return tail


def drawn_loss(logits: Tensor, *, seed: int) -> Tensor:
    """Return minus the log probability, summed over tokens, of labels drawn from logits [..., V].

    Its gradients have the model's true Fisher information as their second moment.
    """
    flat = logits.float().reshape(-1, logits.shape[-1])
    generator = torch.Generator(flat.device).manual_seed(seed)
    chances = torch.softmax(flat.detach(), -1)
    labels = torch.multinomial(chances, 1, generator=generator).squeeze(1)
    return torch.nn.functional.cross_entropy(flat, labels, reduction="sum")


def _number(config: Any, name: str, otherwise: float) -> float:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and value else otherwise
