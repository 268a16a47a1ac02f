"""One decoder block for one new token of each sequence, as a row of calls into the library.

A block of the usual kind takes some fifty operations of torch, whose fixed cost is more than the
memory traffic of a small model. Here it is a dozen calls with arguments made beforehand.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.native import library as lib

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from ar_kernels.linear import QuantLinear
    from ar_kernels.native.modules import NativeNorm


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


class Step:
    """The calls for a number of sequences; made once, for one thread at a time."""

    def __init__(self, parts: Parts, rows: int, dtype: torch.dtype) -> None:
        """Make buffers and arguments."""
        self.parts, self.rows, self.dtype = parts, rows, dtype
        norms = (*parts.norms, *(parts.head_norms or ()))
        biased = [(one, bias) for one in parts.linears if (bias := one.bias) is not None]
        self._floats = [(*_held(n, "weight"), n.weight.data_ptr()) for n in norms]
        self._floats += [(*_held(one, "bias"), bias.data_ptr()) for one, bias in biased]
        # new weights that are loaded into a layer are packed anew, which renews its bias here too
        self._blobs = [(one, one.packed_blob()) for one in parts.linears]
        self.busy = threading.Lock()
        self._library = lib.library()
        self._runtime = lib.runtime(lib.best_isa())
        self._kept: list[Any] = []
        q, k, v, o = parts.attention
        gate, up, down = parts.perceptron
        hidden, inner = q.columns, gate.rows
        make = self._buffer
        normed, query, mixed, back = make(hidden), make(q.rows), make(o.columns), make(o.rows)
        middle, gated, values, product = make(hidden), make(inner), make(inner), make(down.rows)
        self._query, self._mixed, self._middle = query, mixed, middle
        self._first_norm = self._norm(parts.norms[0], normed, normed, 1)
        self._to_heads, self._heads_out = self._several((q, k, v), normed, (query, normed, normed))
        if parts.head_norms is not None:
            self._q_norm = self._norm(parts.head_norms[0], query, query, parts.heads)
            self._k_norm = self._norm(parts.head_norms[1], query, query, parts.kv_heads)
        self._back = self._several((o,), mixed, (back,))[0]
        self._attend = self._attention(query, mixed)
        number, count = lib.DTYPES[dtype], rows * hidden
        self._add_first = (back.data_ptr(), number, count, middle.data_ptr())
        self._second_norm = self._norm(parts.norms[1], middle, normed, 1)
        self._to_gate = self._several((gate, up), normed, (gated, values))[0]
        pointers = gated.data_ptr(), values.data_ptr()
        self._gate = (*pointers, number, rows * inner, gated.data_ptr())
        self._down = self._several((down,), gated, (product,))[0]
        self._add_last = (middle.data_ptr(), product.data_ptr(), number, count)

    def is_good(self) -> bool:
        """Tell whether the parts still hold what the arguments point to."""
        return all(one.packed_blob() is blob for one, blob in self._blobs) and all(
            held[name].data_ptr() == at for held, name, at in self._floats
        )

    def run(
        self,
        x: Tensor,
        turning: tuple[Tensor, Tensor],
        mask: Tensor | None,
        remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Return the block's output for x [B, 1, I]: the same shape and type.

        Args:
            x: contiguous, of the step's number of sequences and type.
            turning: cosines and sines of the position, contiguous [B or 1, 1, W].
            mask: bool [B or 1, H or 1, 1, T], or None.
            remember: takes keys and values [B, N, 1, W], returns those of all tokens [B, N, T, W].
        """
        parts, rows, library, runtime = self.parts, self.rows, self._library, self._runtime
        check, number = lib.check, lib.DTYPES[self.dtype]
        key = torch.empty(rows, 1, parts.kv_heads, parts.width, dtype=self.dtype)
        value, out = torch.empty_like(key), torch.empty_like(x)
        at, to_key = x.data_ptr(), key.data_ptr()
        self._first_norm.x = at
        check(library.ar_norm(runtime, self._first_norm))
        self._heads_out[1].y, self._heads_out[2].y = to_key, value.data_ptr()
        check(library.ar_multiply_several(runtime, *self._to_heads))
        if parts.head_norms is not None:
            self._k_norm.x = self._k_norm.y = to_key
            check(library.ar_norm(runtime, self._q_norm))
            check(library.ar_norm(runtime, self._k_norm))
        cos, sin = turning
        angles = cos.data_ptr(), sin.data_ptr(), number
        apart = cos.shape[0]
        together = rows // apart
        for pointer, heads in ((self._query.data_ptr(), parts.heads), (to_key, parts.kv_heads)):
            check(library.ar_turn(runtime, pointer, *angles, apart, together * heads, parts.width))
        keys, values = remember(key.transpose(1, 2), value.transpose(1, 2))
        self._look(keys, values, mask)
        check(library.ar_multiply_several(runtime, *self._back))
        check(library.ar_add(runtime, at, *self._add_first))
        check(library.ar_norm(runtime, self._second_norm))
        check(library.ar_multiply_several(runtime, *self._to_gate))
        check(library.ar_gate(runtime, *self._gate))
        check(library.ar_multiply_several(runtime, *self._down))
        check(library.ar_add(runtime, *self._add_last, out.data_ptr()))
        return out

    def _look(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Mix the values of all tokens."""
        given, length = self._attend, keys.shape[2]
        keys, values = (t if t.stride(3) == 1 else t.contiguous() for t in (keys, values))
        given.k, given.v, given.length = keys.data_ptr(), values.data_ptr(), length
        given.k0, given.k1, given.k2, _ = keys.stride()
        given.v0, given.v1, given.v2, _ = values.stride()
        given.mask = None
        if mask is not None:
            mask = mask.expand(self.rows, self.parts.heads, 1, length)
            mask = mask if mask.stride(3) == 1 else mask.contiguous()
            given.mask = mask.data_ptr()
            given.mask0, given.mask1 = mask.stride()[:2]
        lib.check(self._library.ar_attend(self._runtime, given))

    def _buffer(self, width: int) -> Tensor:
        with torch.inference_mode(mode=False):  # those made within serve within only
            made = torch.zeros(self.rows, width, dtype=self.dtype)
        self._kept.append(made)
        return made

    def _norm(self, norm: NativeNorm, x: Tensor, y: Tensor, heads: int) -> lib.NormInput:
        rows, columns = self.rows * heads, norm.weight.shape[0]
        reach = rows * columns * x.itemsize
        return lib.NormInput(
            *(x.data_ptr(), reach, rows, columns, columns, lib.DTYPES[self.dtype], norm.form),
            *(norm.weight.data_ptr(), norm.eps, y.data_ptr()),
        )

    def _several(
        self, layers: Sequence[QuantLinear], x: Tensor, outs: Sequence[Tensor]
    ) -> tuple[tuple[Any, ...], ctypes.Array[lib.Product]]:
        """Return the arguments of products with one x, and where their outputs are named."""
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
        return (weights, products, count), products

    def _attention(self, query: Tensor, mixed: Tensor) -> lib.Attention:
        parts, number = self.parts, lib.DTYPES[self.dtype]
        shape = self.rows, parts.heads, parts.kv_heads, 0, parts.width
        strides = parts.heads * parts.width, parts.width, *(0,) * 6
        ends = None, 0, 0, parts.scale, mixed.data_ptr()
        return lib.Attention(query.data_ptr(), None, None, number, *shape, *strides, *ends)


def _held(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the table in which a module holds a parameter, and its name there."""
    return vars(module)["_parameters"], name
