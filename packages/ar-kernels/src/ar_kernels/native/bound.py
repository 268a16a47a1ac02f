"""The product with one packed weight, prepared: a call of few rows costs half as much Python.

That counts for more than it takes by itself: while weights stream through the caches, whatever
Python touches for a call comes from memory too.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ar_kernels.eager import is_eager
from ar_kernels.native import library as lib
from ar_kernels.native.packing import COLUMNS, ROWS
from ar_kernels.native.product import expands_from, isa_for

if TYPE_CHECKING:
    from collections.abc import Mapping


class Bound:
    """A `BoundProduct` of the native library; it uses the instruction set of when it was made."""

    def __init__(self, name: str, blob: Tensor, meta: tuple[int, ...], dtype: torch.dtype) -> None:
        """Prepare the product with a packed weight.

        Args:
            name: of the weight among the layer's buffers.
            blob: the weight, as `pack` made it.
            meta: its integers.
            dtype: of x: float32, float16 or bfloat16.
        """
        isa = isa_for(meta, dtype)
        self._name, self._blob, self._dtype = name, blob, dtype
        self._rows, self._columns = meta[ROWS], meta[COLUMNS]
        self._under = self._columns * expands_from(isa, dtype)
        runtime, weight = lib.runtime(isa), lib.weight(blob, meta)
        given = lib.Bound(ctypes.addressof(runtime), ctypes.addressof(weight), lib.DTYPES[dtype])
        self._kept = runtime, weight, given  # what pointers point to
        self._address = ctypes.addressof(given)
        self._multiply = lib.library().ar_multiply_bound

    def __call__(self, x: Tensor, buffers: Mapping[str, Tensor | None]) -> Tensor | None:
        """Return x [..., I] times the weight transposed: [..., O]; None: not for us."""
        if (
            not is_eager(x)
            or x.dtype is not self._dtype
            or buffers.get(self._name) is not self._blob
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            return None
        *outer, columns = x.shape
        count = x.numel()
        if columns != self._columns or count >= self._under or not x.is_contiguous():
            return None
        out = x.new_empty(*outer, self._rows)
        lib.check(self._multiply(self._address, x.data_ptr(), count // columns, out.data_ptr()))
        return out

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """Return None: a copy of the layer has another weight."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickle as None."""
        return type(None), ()
