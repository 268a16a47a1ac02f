"""Decoder blocks that follow one another, run ahead as one when a token comes.

Between two blocks Python takes longer than the memory it waits for would take to read a block of a
small model. So the first block of a chain runs all of them, and each of the others, when its turn
comes, gives what was computed for it: if its input is to the bit what the block before it gave, and
mask, position and cache are those it was computed with. Otherwise it computes anew. A chain is
trusted once its blocks were seen to be called one after the other with one mask and one position.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ar_kernels.native import library as lib
from ar_kernels.native.layer import Buffers, Step, run_calls, spread
from ar_kernels.native.watched import Watched, WatchedModules, WatchedParameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.hf.growing import Room
    from ar_kernels.hf.taken import Taken


class Given(NamedTuple):
    """What a block is called with beside its input.

    Attributes:
        mask: bool [B or 1, H or 1, 1, T], or None.
        cos: of the position, [B or 1, 1, W].
        sin: as `cos`.
        cache: of Transformers.
    """

    mask: Tensor | None
    cos: Tensor
    sin: Tensor
    cache: Any


class _Ahead:
    """What was computed for the blocks that are not called yet."""

    def __init__(self, given: Given, outs: Tensor, layers: list[tuple[Any, Room]]) -> None:
        self.mask, self.cos, self.sin = given.mask, given.cos, given.sin
        self.cache = weakref.ref(given.cache)
        self.outs = outs.clone().unbind()
        self.layers, self.at = layers, 0

    def next(self, x: Tensor, place: int, given: Given) -> Tensor | None:
        """Return the output of a block, and take its token as past; None: it is another's."""
        if place != self.at or self.cache() is not given.cache:
            return None
        if given.mask is not self.mask or given.cos is not self.cos or given.sin is not self.sin:
            return None
        layer, room = self.layers[place]
        if not room.is_untouched(layer):
            return None
        if place and not _is_same(x, self.outs[place - 1]):
            return None
        room.keep(layer)
        self.at += 1
        return self.outs[place].clone()  # who gets it may change it


def _is_same(x: Tensor, assumed: Tensor) -> bool:
    """Tell whether x is what was assumed, to the bit, and has no history of its own."""
    return x.dtype == assumed.dtype and not x.requires_grad and torch.equal(x, assumed)


class _Run:
    """The calls of all blocks of a chain for a number of sequences."""

    def __init__(self, blocks: Sequence[Taken], rows: int, apart: int) -> None:
        parts = blocks[0].parts
        dtype, hidden = parts.linears[0].dtype, parts.linears[0].columns
        self.key = rows, apart, lib.best_isa()
        buffers = Buffers()
        self.steps = [Step(one.parts, rows, dtype, buffers) for one in blocks]
        self._blobs = Watched(found for step in self.steps for found in step.blobs.found)
        self._floats = WatchedParameters([m for step in self.steps for m in step.floats.modules])
        self.x = buffers.of("x", rows, hidden, dtype)
        self.cos, self.sin = (buffers.of(n, apart, parts.width, dtype) for n in ("cos", "sin"))
        self.outs = buffers.of("outs", len(blocks) * rows, hidden, dtype)
        self.outs = self.outs.view(len(blocks), rows, 1, hidden)
        for step, x, out in zip(self.steps, (self.x, *self.outs), self.outs, strict=False):
            step.wire(x, out)
            step.turn_by(self.cos, self.sin)
        rows_of_calls = [step.calls() for step in self.steps]
        self.calls = (lib.Call * sum(map(len, rows_of_calls)))(
            *(c for r in rows_of_calls for c in r)
        )
        self.rooms: list[weakref.ref[Room] | None] = [None] * len(blocks)

    def is_good(self) -> bool:
        """Tell whether the blocks still hold the weights that the calls point to."""
        return self._blobs.is_same() and self._floats.is_same()

    def __call__(self, x: Tensor, given: Given, layers: list[tuple[Any, Room]]) -> Tensor | None:
        """Return the outputs of all blocks [blocks, B, 1, I]: a buffer; None: does not fit."""
        parts, rows = self.steps[0].parts, len(self.x)
        self.x.copy_(x.view(self.x.shape))
        self.cos.copy_(given.cos.view(self.cos.shape))
        self.sin.copy_(given.sin.view(self.sin.shape))
        mask = spread(given.mask, rows, parts.heads, layers[0][1].filled + 1)
        for i, (_, room) in enumerate(layers):
            known = self.rooms[i]
            if known is None or known() is not room:
                if not room.fits(rows, parts.kv_heads, parts.width, x.dtype):
                    return None
                self.steps[i].remember_in(room.keys, room.values)
                self.rooms[i] = weakref.ref(room)
            if room.filled != layers[0][1].filled:
                return None
            self.steps[i].see(room.filled, mask)
        run_calls(self.calls)
        return self.outs


class Chain:
    """Blocks of one kind that follow one another; a copy is empty, and its blocks run alone."""

    def __init__(self, blocks: Sequence[Taken] = (), layers: Sequence[int] = ()) -> None:
        """Chain blocks with what they were taken with, and their layers of the cache."""
        self._blocks, self._layers = tuple(blocks), tuple(layers)
        self._run: _Run | None = None
        self._ahead: _Ahead | None = None
        self._busy = threading.Lock()
        self._seen: tuple[int, int, int, int] | None = None
        self._trusted = False
        self._watched = WatchedModules(found for one in blocks for found in one.watched.found)

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        """Return an empty chain: the copy of one block must not copy them all."""
        return Chain()

    def __reduce__(self) -> tuple[type[Chain], tuple[()]]:
        """Pickle as an empty chain."""
        return Chain, ()

    def note(self, place: int, given: Given) -> None:
        """See a block run alone."""
        seen = id(given.mask), id(given.cos), id(given.cache)
        if place == 0:
            self._seen = (1, *seen)
        elif self._seen is not None:
            follows = self._seen == (place, *seen)
            self._seen = (place + 1, *seen) if follows else None
            self._trusted |= follows and place + 1 == len(self._blocks)

    def output(self, x: Tensor, place: int, given: Given) -> Tensor | None:
        """Return the output of a block for x [B, 1, I], None: it has to run alone.

        Args:
            x: of the type of the blocks.
            place: of the block in the chain.
            given: what else it is called with.
        """
        ahead = self._ahead
        if place == 0:
            ahead = self._ahead = self._run_ahead(x, given) if self._trusted else None
        if ahead is None:
            return None
        out = ahead.next(x, place, given)
        if out is None:
            self._trusted = False
        if out is None or place + 1 == len(self._blocks):
            self._ahead = None
        return out

    def _run_ahead(self, x: Tensor, given: Given) -> _Ahead | None:
        """Run all blocks, None where that cannot be."""
        layers = self._rooms(given.cache)
        if layers is None or not self._watched.is_same():
            return None
        if not self._busy.acquire(blocking=False):
            return None
        try:
            key = len(x), given.cos.shape[0], lib.best_isa()
            if self._run is None or self._run.key != key or not self._run.is_good():
                self._run = _Run(self._blocks, *key[:2])
            outs = self._run(x, given, layers)
            return None if outs is None else _Ahead(given, outs, layers)
        finally:
            self._busy.release()

    def _rooms(self, cache: Any) -> list[tuple[Any, Room]] | None:
        """Return the layers of a cache and their memory, if all of them have room for a token."""
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            return None
        held, found = cache.layers, []
        if not self._layers or max(self._layers) >= len(held):
            return None
        for index in self._layers:
            layer = held[index]
            room = cast("Room | None", getattr(layer, "ar_room", None))
            if type(layer) is not DynamicLayer or room is None or not room.is_untouched(layer):
                return None
            found.append((layer, room))
        return found
