"""How fast a model runs: tokens per second of reading a prompt and of writing after it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Load:
    """What one pass through a model is given.

    Attributes:
        prompt: tokens of the prompt.
        new: tokens written after it.
        batch: prompts at a time.
        repeat: passes that count; one more goes before them.
    """

    prompt: int = 128
    new: int = 32
    batch: int = 1
    repeat: int = 3


@dataclass(frozen=True)
class Speed:
    """Medians over the passes.

    Attributes:
        prefill: tokens of the prompts per second.
        decode: new tokens per second, of all prompts together.
        step: seconds per new token.
    """

    prefill: float
    decode: float
    step: float


def measure(
    model: nn.Module,
    load: Load,
    *,
    forward: Callable[..., Any] | None = None,
    cache: Callable[[], Any] = lambda: None,
) -> Speed:
    """Return the speed of a causal language model on random tokens, greedy, with its cache.

    Args:
        model: the model.
        load: what a pass is given; with `repeat` 0 the first pass is the only one and counts.
        forward: called instead of the model.
        cache: returns an empty cache for a pass; None lets the model make its own.
    """
    import torch

    device = next(model.parameters()).device
    words = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words, (load.batch, load.prompt), generator=made).to(device)
    reads, steps = [], []
    with torch.inference_mode():
        for passed in range(load.repeat + 1):
            read, written = _pass(forward or model, ids, load.new, _clock(device), cache())
            if passed or not load.repeat:
                reads.append(read)
                steps += written
    step = median(steps)
    tokens = load.batch * load.prompt
    return Speed(prefill=tokens / median(reads), decode=load.batch / step, step=step)


def backends_of(model: nn.Module) -> dict[str, int]:
    """Return how many quantized layers each backend runs, the most used first."""
    from ar_kernels import QuantLinear

    found = Counter(
        m.backend or "not prepared" for m in model.modules() if isinstance(m, QuantLinear)
    )
    return dict(found.most_common())


def _pass(
    model: Any, ids: Tensor, new: int, clock: Callable[[], float], cache: Any
) -> tuple[float, list[float]]:
    """Return the seconds of the prompt, and of each new token."""
    began = clock()
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = out.logits[:, -1:].argmax(-1)
    read = clock() - began
    steps = []
    for _ in range(new):
        began = clock()
        out = model(input_ids=last, past_key_values=out.past_key_values, use_cache=True)
        last = out.logits[:, -1:].argmax(-1)
        steps.append(clock() - began)
    return read, steps


def _clock(device: torch.device) -> Callable[[], float]:
    """Return a clock that waits for the device."""
    if device.type == "cpu":
        return time.perf_counter
    import torch

    wait = getattr(torch, device.type).synchronize

    def clock() -> float:
        wait()
        return time.perf_counter()

    return clock
