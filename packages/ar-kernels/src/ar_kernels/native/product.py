"""Products with packed weights."""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from ar_kernels.native import library as lib
from ar_kernels.native.packing import COLUMNS, COUNT, FLAGS, ONLY_FLOAT32, ROWS
from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from torch import Tensor

_EXPAND_FROM = {
    ("avx512_bf16", torch.float32): 64,
    ("avx512", torch.float32): 96,
    ("avx512", torch.float16): 96,
    ("avx512", torch.bfloat16): 96,
}
"""Rows of x from which expanding the weight to float32 and a float product are faster. They never
were, up to 2048 rows, on a processor with AVX2 alone."""
_CHUNK = 1 << 22
"""Weights expanded at once: 16 MB in float32, about what a last-level cache holds."""


def linear(
    x: Tensor,
    blob: Tensor,
    meta: tuple[int, ...],
    bias: Tensor | None = None,
    *,
    isa: str | None = None,
) -> Tensor:
    """Return x [..., I] times the weight transposed, plus bias [O]: [..., O], dtype of x.

    Args:
        x: float32, float16 or bfloat16 on the CPU.
        blob: the weight, as `pack` made it.
        meta: its integers.
        bias: one value per feature, any float type.
        isa: instruction set to use; None takes the best.

    Raises:
        KernelError: x or the blob do not fit the meta, or the processor lacks the instructions.
    """
    rows, columns = meta[ROWS], meta[COLUMNS]
    _check(x, columns)
    isa = isa_for(meta, x.dtype, isa)
    if x.numel() >= columns * expands_from(isa, x.dtype):
        flat = x.reshape(-1, columns)
        return _by_expansion(flat, blob, meta, bias, isa).view(*x.shape[:-1], rows)
    out = x.new_empty((*x.shape[:-1], rows))
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    product = product_of(x, out, bias)
    lib.check(lib.library().ar_multiply(lib.runtime(isa), lib.weight(blob, meta), product))
    return out


def experts_linear(
    x: Tensor,
    blob: Tensor,
    meta: tuple[int, ...],
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    isa: str | None = None,
) -> Tensor:
    """Return x [T, I], sorted by expert, times each token's expert: [T, O], dtype of x.

    Args:
        x: tokens of expert 0, then those of expert 1, ...
        blob: the experts' weights, joined.
        meta: their integers.
        offsets: int64 [E + 1]: rows offsets[e] to offsets[e + 1] of x are those of expert e.
        bias: [E, O] or None.
        isa: instruction set to use; None takes the best.

    Raises:
        KernelError: offsets do not rise from 0 to T, or x or the blob do not fit the meta.
    """
    _check(x, meta[COLUMNS])
    out = torch.empty(len(x), meta[ROWS], dtype=x.dtype)
    offsets = offsets.to(torch.int64).contiguous()
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
        if bias.shape != (meta[COUNT], meta[ROWS]):
            msg = f"bias is {list(bias.shape)}, the experts need {[meta[COUNT], meta[ROWS]]}"
            raise KernelError(msg)
    product = product_of(x, out, bias)
    lib.check(
        lib.library().ar_multiply_experts(
            *(lib.runtime(isa_for(meta, x.dtype, isa)), lib.weight(blob, meta), product),
            *(offsets.data_ptr(), offsets.numel()),
        )
    )
    return out


def expand(
    blob: Tensor,
    meta: tuple[int, ...],
    dtype: torch.dtype,
    begin: int = 0,
    end: int | None = None,
    *,
    isa: str | None = None,
) -> Tensor:
    """Return features [begin, end) of the weight, dequantized: [end - begin, I].

    Raises:
        KernelError: `begin` is no multiple of 64, or the range lies outside of the weight.
    """
    end = meta[ROWS] if end is None else end
    out = torch.empty(max(0, end - begin), meta[COLUMNS], dtype=dtype)
    size = out.numel() * out.itemsize
    lib.check(
        lib.library().ar_expand(
            *(lib.runtime(isa), lib.weight(blob, meta), begin, end, lib.DTYPES[dtype]),
            *(out.data_ptr(), size),
        )
    )
    return out


def expert(blob: Tensor, meta: tuple[int, ...], index: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return (blob, meta) of one of several joined weights."""
    sizes = lib.sizes(meta)
    each = (sizes.all - sizes.header) // meta[COUNT]
    begin = sizes.header + index * each
    alone = torch.cat([blob[: sizes.header], blob[begin : begin + each]])
    return alone, (*meta[:COUNT], 1, *meta[COUNT + 1 :])


def _by_expansion(
    x: Tensor, blob: Tensor, meta: tuple[int, ...], bias: Tensor | None, isa: str
) -> Tensor:
    """Return the product by expanding some features to float32 at a time."""
    rows, columns = meta[ROWS], meta[COLUMNS]
    step = max(64, _CHUNK // columns // 64 * 64)
    out = torch.empty(len(x), rows, dtype=x.dtype)
    wide = x.float()
    with torch.autocast("cpu", enabled=False):
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            some = expand(blob, meta, torch.float32, begin, end, isa=isa)
            add = None if bias is None else bias[begin:end].float()
            out[:, begin:end] = functional.linear(wide, some, add)
    return out


def isa_for(meta: tuple[int, ...], dtype: torch.dtype, isa: str | None = None) -> str:
    """Return the instruction set for a product: that of bf16 only where bf16 holds the weights."""
    isa = isa or lib.best_isa()
    inexact = meta[FLAGS] & ONLY_FLOAT32 and dtype != torch.bfloat16
    return "avx512" if inexact and isa == "avx512_bf16" else isa


def expands_from(isa: str, dtype: torch.dtype) -> int:
    """Return the rows of x from which the weight is expanded for a float product."""
    return _EXPAND_FROM.get((isa, dtype), 1 << 62)


def _check(x: Tensor, columns: int) -> None:
    if x.dtype not in lib.DTYPES or not x.is_cpu or x.shape[-1] != columns:
        msg = (
            f"x is {x.dtype} {list(x.shape)} on {x.device}; the native CPU kernels need float32, "
            f"float16 or bfloat16 [..., {columns}] on the CPU"
        )
        raise KernelError(msg)


def product_of(x: Tensor, out: Tensor, bias: Tensor | None) -> lib.Product:
    """Return the arguments of a product as C takes them: x [..., I], out and bias contiguous."""
    columns = x.shape[-1]
    if not x.is_contiguous() and (x.dim() != 2 or x.stride(1) != 1 or x.stride(0) < 0):
        x = x.contiguous()
    size = x.itemsize
    rows = x.numel() // columns
    stride = x.stride(0) if x.dim() == 2 else columns
    reach = ((rows - 1) * stride + columns) * size if rows else 0
    made = lib.Product(
        *(x.data_ptr(), reach, rows, stride, lib.DTYPES[x.dtype]),
        *(None if bias is None else bias.data_ptr(), out.data_ptr(), out.numel() * size),
    )
    made.kept = (x, out, bias)  # what the pointers point to
    return made


def read_bandwidth(buffer: Tensor) -> float:
    """Return the bytes per second at which all threads read a uint8 buffer once.

    Raises:
        KernelError: the library is not there.
    """
    found = ctypes.c_float()
    began = time.perf_counter()
    status = lib.library().ar_read(
        lib.runtime(), buffer.data_ptr(), buffer.numel(), ctypes.byref(found)
    )
    spent = time.perf_counter() - began
    lib.check(status)
    return buffer.numel() / spent
