"""bf16 weights in 12 bits without loss, for products of a few rows: `torch.ops.ar_kernels`.

A new token reads every weight of a float layer once, so a quarter fewer bytes are a third more
speed. Values are those of the weight to the bit; sums are made in the order of `steps.linear`, but
for a few values that are kept apart. Importing this module registers the op.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ar_kernels.native import library as lib
from ar_kernels.native.arena import large_pages
from ar_kernels.native.product import product_of
from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable

WORTH = 0.85
"""Bytes of a compact weight for one of the weight's own up to which making it pays."""
_PART = 64 << 20
"""Bytes of a weight that are read at a time."""

_LIBRARY = torch.library.Library("ar_kernels", "FRAGMENT")
_LIBRARY.define(
    "step_compact_linear(Tensor x, Tensor blob, int features, int outliers, Tensor? bias) -> Tensor"
)


@dataclass(frozen=True)
class Compact:
    """A compact weight [O, I].

    Attributes:
        blob: uint8, in the layout of compact.h.
        features: O.
        outliers: how many values are kept apart.
    """

    blob: Tensor
    features: int
    outliers: int


def compact(weight: Tensor, done_with: Callable[[Tensor], None] | None = None) -> Compact | None:
    """Return a bf16 weight [O, I] on the CPU in 12 bits a value.

    None where that is impossible or does not pay: values that are not finite, many of them smaller
    than fifteen powers of two below the largest of their row, or few columns.

    Args:
        weight: contiguous; read twice, part by part.
        done_with: is called with each part that was read.

    Raises:
        KernelError: another type, device or number of dimensions.
    """
    fits = weight.dtype == torch.bfloat16 and weight.is_cpu and weight.dim() == 2  # noqa: PLR2004
    if not fits or not weight.is_contiguous():
        msg = (
            f"a weight is {weight.dtype} {list(weight.shape)} on {weight.device}: a compact one is "
            f"made of contiguous bf16 [O, I] on the CPU"
        )
        raise KernelError(msg)
    features, columns = weight.shape
    library, runtime = lib.library(), lib.runtime(lib.best_isa())
    floats = lib.Floats(weight.data_ptr(), weight.nbytes, features, columns)
    ends = (ctypes.c_uint32 * features)()
    at = ctypes.addressof(ends)
    parts = _parts(weight)
    for begin, end in parts:
        status = library.ar_compact_ends(runtime, floats, begin, end, at)
        if status == lib.BAD_RANGE:
            return None
        lib.check(status)
        if done_with is not None:
            done_with(weight[begin:end])
    outliers = ends[features - 1]
    size = library.ar_compact_bytes(features, columns, outliers)
    if size > WORTH * weight.nbytes:
        return None
    blob = large_pages(size)
    for begin, end in parts:
        lib.check(library.ar_compact(runtime, floats, begin, end, at, blob.data_ptr(), size))
        if done_with is not None:
            done_with(weight[begin:end])
    return Compact(blob, features, outliers)


def _parts(weight: Tensor) -> list[tuple[int, int]]:
    """Return ranges of features."""
    features = len(weight)
    step = max(1, _PART * features // max(1, weight.nbytes))
    return [(begin, min(begin + step, features)) for begin in range(0, features, step)]


def linear(
    x: Tensor, blob: Tensor, features: int, outliers: int, bias: Tensor | None = None
) -> Tensor:
    """Return x [..., I], bf16 of at most `steps.FLOAT_ROWS` rows, times a weight [O, I] transposed.

    Args:
        x: on the CPU.
        blob: of a `Compact`, as the next two are.
        features: O.
        outliers: how many values are kept apart.
        bias: one value per feature, or None.

    Raises:
        KernelError: too many rows, another type, or a blob that does not fit.
    """
    out = x.new_empty((*x.shape[:-1], features))
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    weight = lib.Compact(blob.data_ptr(), blob.numel(), features, x.shape[-1], outliers)
    given = product_of(x, out, bias)
    lib.check(lib.library().ar_multiply_compact(lib.runtime(lib.best_isa()), weight, given))
    return out


def _shape(
    x: Tensor,
    blob: Tensor,  # noqa: ARG001 - the op's signature
    features: int,
    outliers: int,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty((*x.shape[:-1], features))


_LIBRARY.impl("step_compact_linear", linear, "CPU")
torch.library.register_fake("ar_kernels::step_compact_linear", _shape, lib=_LIBRARY)
