"""One decoder block for one new token of each sequence, as a row of calls in the library.

A block of the usual kind takes some fifty operations of torch, whose fixed cost is more than the
memory traffic of a small model. Here it is one call with arguments made beforehand, and one set of
threads that goes through all of it.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ar_kernels.layer_tensors import READY_BLOB
from ar_kernels.native import library as lib
from ar_kernels.native.watched import Watched, WatchedParameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.linear import QuantLinear
    from ar_kernels.native.modules import NativeNorm

    _Call = tuple[int, Any] | tuple[int, Any, Any, int]
    # its kind and argument; of products the weights, and the products and their number


@dataclass(frozen=True)
class Parts:
    """The modules of a block, and the shape of its attention.

    Attributes:
        norms: before the attention and before the perceptron.
        head_norms: of each head's query and key, None: none.
        attention: projections to query, key and value, and back.
        perceptron: projections to gate and to values, and back.
        heads: of queries.
        kv_heads: of keys and values.
        width: of a head.
        scale: of the products of queries and keys.
    """

    norms: tuple[NativeNorm, NativeNorm]
    head_norms: tuple[NativeNorm, NativeNorm] | None
    attention: tuple[QuantLinear, QuantLinear, QuantLinear, QuantLinear]
    perceptron: tuple[QuantLinear, QuantLinear, QuantLinear]
    heads: int
    kv_heads: int
    width: int
    scale: float

    @property
    def linears(self) -> tuple[QuantLinear, ...]:
        """All quantized layers."""
        return (*self.attention, *self.perceptron)


class Memory(Protocol):
    """Keys and values of the tokens seen so far, to which a step adds one."""

    def places(self) -> tuple[Tensor, Tensor] | None:
        """Return where the new key and value go, [B, N, 1, W] each; None: use `update`."""

    def with_places(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, N, T, W] up to and with those places."""

    def keep(self) -> None:
        """Take what was written there as a token of the past."""

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add a key and a value [B, N, 1, W], and return those of all tokens."""


class Buffers(dict[str, "Tensor"]):
    """Memory between the calls of a step, which steps that follow one another can share."""

    def of(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return a buffer [rows, width], made if it is not there."""
        if name not in self:
            with torch.inference_mode(mode=False):  # those made within serve within only
                self[name] = torch.zeros(rows, width, dtype=dtype)
        return self[name]


class Step:
    """The calls for a number of sequences; made once, for one thread at a time."""

    def __init__(
        self, parts: Parts, rows: int, dtype: torch.dtype, buffers: Buffers | None = None
    ) -> None:
        """Make buffers, unless they are given, and arguments."""
        self.parts, self.rows, self.dtype = parts, rows, dtype
        self.blobs, self.floats = _watched(parts)
        self.busy = threading.Lock()
        self._library = lib.library()
        self._runtime = lib.runtime(lib.best_isa())
        self._kept: list[Any] = []
        q, k, v, o = parts.attention
        gate, up, down = parts.perceptron
        hidden, inner = q.columns, gate.rows
        buffers = Buffers() if buffers is None else buffers
        self._kept.append(buffers)

        def make(**widths: int) -> list[Tensor]:
            return [buffers.of(name, rows, width, dtype) for name, width in widths.items()]

        normed, query, key, value = make(normed=hidden, query=q.rows, key=k.rows, value=v.rows)
        mixed, back, middle = make(mixed=o.columns, back=o.rows, middle=hidden)
        gated, values, product = make(gated=inner, values=inner, product=down.rows)
        self._first_norm = self._norm(parts.norms[0], normed, normed, 1)
        head_norms: list[_Call] = []
        if parts.head_norms is not None:
            both = zip(parts.head_norms, (query, key), (parts.heads, parts.kv_heads), strict=True)
            head_norms = [(lib.NORM, self._norm(n, x, x, heads)) for n, x, heads in both]
        self._turns = [
            self._turn(query, parts.heads),
            self._turn(key, parts.kv_heads),
        ]
        self._copies = [self._copy(key), self._copy(value)]
        self._attend = self._attention(query, mixed)
        self._add_first = self._pair(middle, back, middle)
        self._add_last = self._pair(middle, product, middle)
        before: list[_Call] = [
            (lib.NORM, self._first_norm),
            self._products((q, k, v), normed, (query, key, value)),
            *head_norms,
            *((lib.TURN, one) for one in self._turns),
            *((lib.COPY, one) for one in self._copies),
        ]
        behind: list[_Call] = [
            (lib.ATTEND, self._attend),
            self._products((o,), mixed, (back,)),
            (lib.ADD, self._add_first),
            (lib.NORM, self._norm(parts.norms[1], middle, normed, 1)),
            self._products((gate, up), normed, (gated, values)),
            (lib.GATE, self._pair(gated, values, gated)),
            self._products((down,), gated, (product,)),
            (lib.ADD, self._add_last),
        ]
        self._calls = self._row((*before, *behind))
        self._before, self._all = len(before), len(before) + len(behind)

    def is_good(self) -> bool:
        """Tell whether the parts still hold what the arguments point to."""
        return self.blobs.is_same() and self.floats.is_same()

    def run(
        self,
        x: Tensor,
        turning: tuple[Tensor, Tensor],
        mask: Tensor | None,
        memory: Memory,
    ) -> Tensor:
        """Return the block's output for x [B, 1, I]: the same shape and type.

        Args:
            x: contiguous, of the step's number of sequences and type.
            turning: cosines and sines of the position, contiguous [B or 1, 1, W].
            mask: bool [B or 1, H or 1, 1, T], or None.
            memory: of the keys and values of all tokens.
        """
        out = torch.empty_like(x)
        self.wire(x, out)
        self.turn_by(*turning)
        places = memory.places()
        if places is None:
            self._apart(mask, memory)
            return out
        for copy, place in zip(self._copies, places, strict=True):
            copy.y = place.data_ptr()
            copy.y0, copy.y1 = place.stride()[:2]
        self._look(*memory.with_places(), mask)
        self._run(0, self._all)
        memory.keep()
        return out

    def wire(self, x: Tensor, out: Tensor) -> None:
        """Say where the block's input and output are, [B, I] or with a 1 between."""
        self._first_norm.x = self._add_first.a = x.data_ptr()
        self._add_last.y = out.data_ptr()

    def turn_by(self, cos: Tensor, sin: Tensor) -> None:
        """Say where cosines and sines are, [B or 1, 1, W] each."""
        apart = cos.shape[0]
        for turn, heads in zip(self._turns, (self.parts.heads, self.parts.kv_heads), strict=True):
            turn.cos, turn.sin, turn.sequences = cos.data_ptr(), sin.data_ptr(), apart
            turn.heads = self.rows // apart * heads

    def remember_in(self, keys: Tensor, values: Tensor) -> None:
        """Say where keys and values [B, N, T, W] are kept; `see` says which of them are there."""
        for copy, held in zip(self._copies, (keys, values), strict=True):
            copy.y0, copy.y1 = held.stride()[:2]
        self._point(keys, values)
        self._steps = [
            (copy, held.data_ptr(), held.stride(2) * held.itemsize)
            for copy, held in zip(self._copies, (keys, values), strict=True)
        ]

    def see(self, tokens: int, mask: Tensor | None) -> None:
        """Put the new token behind so many others, and look at all of them.

        Args:
            tokens: before the new one, there is room for one more.
            mask: bool [B, H, 1, tokens + 1] with its values side by side, or None.
        """
        for copy, at, step in self._steps:
            copy.y = at + tokens * step
        self._attend.length = tokens + 1
        self._attend.mask = None
        if mask is not None:
            self._attend.mask = mask.data_ptr()
            self._attend.mask0, self._attend.mask1 = mask.stride()[:2]

    def calls(self) -> ctypes.Array[lib.Call]:
        """Return the row of calls; it points to what the step keeps."""
        return self._calls

    def _apart(self, mask: Tensor | None, memory: Memory) -> None:
        """Run with a memory that takes keys and values its own way."""
        parts = self.parts
        both = [
            torch.empty(self.rows, parts.kv_heads, 1, parts.width, dtype=self.dtype)
            for _ in range(2)
        ]
        for copy, new in zip(self._copies, both, strict=True):
            copy.y = new.data_ptr()
            copy.y0, copy.y1 = new.stride()[:2]
        self._run(0, self._before)
        keys, values = (
            t if t.stride(3) == 1 else t.contiguous() for t in memory.update(both[0], both[1])
        )
        self._look(keys, values, mask)
        self._run(self._before, self._all)

    def _run(self, begin: int, end: int) -> None:
        """Run a part of the row of calls."""
        first = ctypes.addressof(self._calls) + begin * ctypes.sizeof(lib.Call)
        threads = torch.get_num_threads()
        lib.check(self._library.ar_run(self._runtime, first, end - begin, threads))

    def _look(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Say where the keys and values of all tokens are."""
        given, length = self._attend, keys.shape[2]
        self._point(keys, values)
        given.length, given.mask = length, None
        self._mask = spread(mask, self.rows, self.parts.heads, length)
        if self._mask is not None:
            given.mask = self._mask.data_ptr()
            given.mask0, given.mask1 = self._mask.stride()[:2]

    def _point(self, keys: Tensor, values: Tensor) -> None:
        given = self._attend
        given.k, given.v = keys.data_ptr(), values.data_ptr()
        given.k0, given.k1, given.k2, _ = keys.stride()
        given.v0, given.v1, given.v2, _ = values.stride()

    def _row(self, calls: Sequence[_Call]) -> ctypes.Array[lib.Call]:
        """Return calls as C takes them."""
        row = (lib.Call * len(calls))()
        for i, (kind, what, *more) in enumerate(calls):
            self._kept.append(what)
            row[i].kind, row[i].what = kind, ctypes.addressof(what)
            if more:
                row[i].with_, row[i].count = ctypes.addressof(more[0]), more[1]
                self._kept.append(more[0])
        return row

    def _norm(self, norm: NativeNorm, x: Tensor, y: Tensor, heads: int) -> lib.NormInput:
        rows, columns = self.rows * heads, norm.weight.shape[0]
        reach = rows * columns * x.itemsize
        return lib.NormInput(
            *(x.data_ptr(), reach, rows, columns, columns, lib.DTYPES[self.dtype], norm.form),
            *(norm.weight.data_ptr(), norm.eps, y.data_ptr()),
        )

    def _products(self, layers: Sequence[QuantLinear], x: Tensor, outs: Sequence[Tensor]) -> _Call:
        """Return the call for products with one x."""
        count, size = len(layers), x.itemsize
        weights, products = (lib.Weight * count)(), (lib.Product * count)()
        for i, (layer, out) in enumerate(zip(layers, outs, strict=True)):
            blob, bias = layer.packed_blob(), layer.bias
            assert blob is not None
            wide = None if bias is None else bias.detach().float().contiguous()
            weights[i] = lib.weight(blob, layer.packed_meta())
            products[i] = lib.Product(
                *(x.data_ptr(), x.numel() * size, self.rows, layer.columns),
                *(lib.DTYPES[self.dtype], None if wide is None else wide.data_ptr()),
                *(out.data_ptr(), self.rows * layer.rows * size),
            )
            self._kept += [blob, wide]
        return lib.PRODUCTS, weights, products, count

    def _pair(self, a: Tensor, b: Tensor, y: Tensor) -> lib.Pair:
        number = lib.DTYPES[self.dtype]
        return lib.Pair(a.data_ptr(), b.data_ptr(), number, a.numel(), y.data_ptr())

    def _turn(self, x: Tensor, heads: int) -> lib.Turn:
        number = lib.DTYPES[self.dtype]
        return lib.Turn(x.data_ptr(), None, None, number, self.rows, heads, self.parts.width)

    def _copy(self, x: Tensor) -> lib.Copy:
        shape = self.rows, self.parts.kv_heads, self.parts.width
        return lib.Copy(x.data_ptr(), lib.DTYPES[self.dtype], *shape, None, 0, 0)

    def _attention(self, query: Tensor, mixed: Tensor) -> lib.Attention:
        parts, number = self.parts, lib.DTYPES[self.dtype]
        shape = self.rows, parts.heads, parts.kv_heads, 0, parts.width
        strides = parts.heads * parts.width, parts.width, *(0,) * 6
        ends = None, 0, 0, parts.scale, mixed.data_ptr()
        return lib.Attention(query.data_ptr(), None, None, number, *shape, *strides, *ends)


def _watched(parts: Parts) -> tuple[Watched, WatchedParameters]:
    """Return what arguments point to: packed weights, and the values of norms and biases."""
    floats = [(norm, "weight") for norm in (*parts.norms, *(parts.head_norms or ()))]
    biases = [(one, "bias") for one in parts.linears if one.bias is not None]
    # new weights that are loaded into a layer are packed anew, which renews its bias here too
    blobs = [(vars(one)["_buffers"], READY_BLOB, one.packed_blob()) for one in parts.linears]
    return Watched(blobs), WatchedParameters([*floats, *biases])


def spread(mask: Tensor | None, rows: int, heads: int, length: int) -> Tensor | None:
    """Return a mask [B or 1, H or 1, 1, T] as [B, H, 1, T] with its values side by side."""
    if mask is None:
        return None
    mask = mask.expand(rows, heads, 1, length)
    return mask if mask.stride(3) == 1 else mask.contiguous()


def run_calls(calls: ctypes.Array[lib.Call]) -> None:
    """Run a row of calls with torch's threads."""
    given = lib.runtime(lib.best_isa()), ctypes.addressof(calls), len(calls)
    lib.check(lib.library().ar_run(*given, torch.get_num_threads()))
