"""Blocks compiled with torch.compile for the tuning loop, where that works.

Every block gets a compiled function of its own, made anew: what one block was compiled to depends
on nothing that came before it, so a resumed run compiles the same things as one that was never cut
short. Graphs are looked up in torch's cache on disk, so only the first block pays in full (measured
on a Llama block, CPU: about 1 s for each further one).
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.func import functional_call

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn


class Forward(Protocol):
    """Runs a block with some of its weights replaced."""

    def __call__(
        self,
        block: nn.Module,
        weights: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> object:
        """Return the block's output."""


def plain(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> object:
    """Return the block's output, computed operation by operation."""
    return functional_call(block, dict(weights), args, kwargs)


class Compiled:
    """Runs blocks compiled; a kind of block that cannot be compiled runs plain from then on.

    Calls without gradients run plain: they are few, and would need a graph of their own.

    Args:
        tell: called with a sentence when a kind of block cannot be compiled.
        backend: of torch.compile.
    """

    def __init__(self, tell: Callable[[str], None], *, backend: str = "inductor") -> None:
        self._tell = tell
        self._backend = backend
        self._failed: set[type] = set()
        self._block: nn.Module | None = None
        self._call: Callable[..., object] = plain
        self._count = 0

    def __call__(
        self,
        block: nn.Module,
        weights: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> object:
        """Return the block's output."""
        if type(block) in self._failed or not torch.is_grad_enabled():
            return plain(block, weights, args, kwargs)
        if block is not self._block:
            self._block, self._call = block, self._fresh()
        try:
            return self._call(block, dict(weights), args, kwargs)
        except RuntimeError as error:
            self._failed.add(type(block))
            self._block = None
            output = plain(block, weights, args, kwargs)  # an error of the block itself comes again
            name = type(block).__name__
            self._tell(f"{name} cannot be compiled and is tuned as it is: {cause(error)}")
            return output

    def _fresh(self) -> Callable[..., object]:
        """Return a compiled function that shares nothing with earlier ones.

        torch keeps what it has compiled with the code object, and gives up after some variants of
        one; so each block has its own.
        """
        self._count += 1
        code = plain.__code__.replace(co_name=f"block_{self._count}")
        function = types.FunctionType(code, plain.__globals__)
        compiled: Callable[..., object] = torch.compile(
            function, backend=self._backend, fullgraph=True, dynamic=False
        )
        return compiled


def refusal(device: torch.device, *, backend: str = "inductor") -> str | None:
    """Return why nothing can be compiled on a device, or None: a tiny function is tried.

    A machine without a C++ compiler, say, is found out before work begins.
    """
    try:
        probe = torch.compile(lambda x: (x * 2).sum(), backend=backend, fullgraph=True)
        probe(torch.ones(4, device=device))
    except RuntimeError as error:
        return cause(error)
    return None


def cause(error: Exception) -> str:
    """Return what an error of torch.compile comes from, in one line.

    torch wraps a backend's error and begins with a line that only names the backend.
    """
    inner = getattr(error, "inner_exception", error)
    first = str(inner).strip().partition("\n")[0]
    return first if inner is error else f"{type(inner).__name__}: {first}"
