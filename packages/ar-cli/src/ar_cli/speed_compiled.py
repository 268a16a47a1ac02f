"""How fast a model runs under torch.compile, beside what `ar_cli.speed` measures without."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ar_cli.speed import Load, Speed, measure
from ar_schemes import ArError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class CompiledSpeed:
    """Medians over the passes of a compiled model.

    Attributes:
        speed: as without compiling.
        compile_seconds: time of the pass that compiles, less an ordinary pass.
        whole: whether prompt and step are one graph each; else Python runs between graphs.
    """

    speed: Speed
    compile_seconds: float
    whole: bool


def refuse_compiling(device: str, *, backend: str = "inductor") -> None:
    """Return if something can be compiled on a device.

    Raises:
        ArError: it cannot; no C++ compiler, say, or a backend that torch does not know.
    """
    import torch

    from ar_tuner.compiling import refusal

    why = refusal(torch.device(device), backend=backend)
    if why is not None:
        msg = (
            f"--compile: torch.compile with backend {backend!r} does not work here: {why}. "
            "Backend inductor needs a C++ compiler (g++ or clang++, or its path in CXX); "
            "install one, or leave --compile out."
        )
        raise ArError(msg)


def measure_compiled(model: nn.Module, load: Load, *, backend: str = "inductor") -> CompiledSpeed:
    """Return the speed of a causal language model, compiled with a cache of fixed length.

    The prompt and the step of one token are a graph each. Where the model does not fit in whole
    graphs, it is compiled with breaks.

    Raises:
        ArError: the model cannot be compiled, or takes no cache of fixed length.
    """
    import torch
    from torch._dynamo.exc import TorchDynamoException, Unsupported

    from ar_tuner.compiling import cause

    whole = True
    try:
        try:
            return _measured(model, load, backend, whole=True)
        except Unsupported:
            whole = False
            torch.compiler.reset()
            return _measured(model, load, backend, whole=False)
    except (TorchDynamoException, NotImplementedError) as error:
        breaks = "" if whole else ", not even with breaks"
        msg = f"--compile: {type(model).__name__} cannot be compiled{breaks}: {cause(error)}"
        raise ArError(msg) from error


def _measured(model: Any, load: Load, backend: str, *, whole: bool) -> CompiledSpeed:
    import torch
    from transformers import StaticCache

    config = model.config.get_text_config(decoder=True)
    cache = StaticCache(config=config, max_cache_len=load.prompt + load.new)
    device = next(model.parameters()).device
    with torch.inference_mode():  # the cache gets its memory here: else that is compiled too
        first = torch.zeros(load.batch, 1, dtype=torch.int64, device=device)
        model(input_ids=first, past_key_values=cache, use_cache=True)

    def emptied() -> StaticCache:
        cache.reset()
        return cache

    forward = torch.compile(model.forward, backend=backend, fullgraph=whole, dynamic=False)
    began = time.perf_counter()
    measure(model, Load(load.prompt, 1, load.batch, 0), forward=forward, cache=emptied)
    compiled = time.perf_counter() - began
    speed = measure(model, load, forward=forward, cache=emptied)
    ordinary = load.batch * load.prompt / speed.prefill + speed.step
    return CompiledSpeed(speed, max(0.0, compiled - ordinary), whole)
