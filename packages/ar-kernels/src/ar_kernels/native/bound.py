"""The product with one packed weight, prepared: a call of few rows costs little Python.

That counts for more than it takes by itself: while weights stream through the caches, whatever
Python touches for a call comes from memory too. So the call goes through a module of ours in C
where it was built and torch has DLPack's C exchange API, and through ctypes elsewhere.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ar_kernels.eager import is_eager
from ar_kernels.native import library as lib
from ar_kernels.native.packing import COLUMNS, ROWS
from ar_kernels.native.product import expands_from, isa_for

if TYPE_CHECKING:
    from collections.abc import Mapping

Call = Callable[[Tensor, Tensor], int]
"""call(x, y) writes the product of x to y: returns a status of the library, or `NOT_FOR_US`."""
NOT_FOR_US = -1


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
        self._rows, self._under = meta[ROWS], meta[COLUMNS] * expands_from(isa, dtype)
        runtime, weight = lib.runtime(isa), lib.weight(blob, meta)
        given = lib.Bound(ctypes.addressof(runtime), ctypes.addressof(weight), lib.DTYPES[dtype])
        self._kept = runtime, weight, given  # what pointers point to
        shape = meta[ROWS], meta[COLUMNS]
        self._call = quick_call(given, shape) or ctypes_call(given, shape)

    def __call__(self, x: Tensor, buffers: Mapping[str, Tensor | None]) -> Tensor | None:
        """Return x [..., I] times the weight transposed: [..., O]; None: not for us."""
        if (
            not is_eager(x)
            or x.dtype is not self._dtype
            or buffers.get(self._name) is not self._blob
            or (x.requires_grad and torch.is_grad_enabled())
            or x.numel() >= self._under
        ):
            return None
        out = x.new_empty((*x.shape[:-1], self._rows))
        status = self._call(x, out)
        if status:
            if status == NOT_FOR_US:
                return None
            lib.check(status)
        return out

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """Return None: a copy of the layer has another weight."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickle as None."""
        return type(None), ()


def quick_call(bound: lib.Bound, shape: tuple[int, int]) -> Call | None:
    """Return the call by our module in C, or None where it or torch's part of it is missing."""
    try:
        module: Any = importlib.import_module("ar_kernels.native._quick_call")
    except ImportError:
        return None
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    multiply = ctypes.cast(lib.library().ar_multiply_bound, ctypes.c_void_p).value
    pointers = multiply, ctypes.addressof(bound)
    made: Call | None = module.prepare(exchange, *pointers, bound.dtype, *shape)
    return made


def ctypes_call(bound: lib.Bound, shape: tuple[int, int]) -> Call:
    """Return the call by ctypes."""
    address, multiply = ctypes.addressof(bound), lib.library().ar_multiply_bound
    rows, columns = shape

    def call(x: Tensor, y: Tensor) -> int:
        """Multiply, where x [..., columns] and y [..., rows] have no gaps."""
        if not x.dim() or x.shape[-1] != columns or not x.is_contiguous():
            return NOT_FOR_US
        status: int = multiply(address, x.data_ptr(), x.numel() // columns, y.data_ptr())
        return status

    return call
