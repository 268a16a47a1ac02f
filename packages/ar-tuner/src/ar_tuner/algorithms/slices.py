"""A large weight in slices of rows, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ar_kernels.weight import bits
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels import QuantizedWeight
    from ar_tuner.algorithms.base import Target

SLICE = 2**25
"""Weights whose codes are computed at once."""


def slices_of(shape: Sequence[int], target: Target) -> tuple[slice, ...]:
    """Return the rows of a weight [O, I] in slices of bounded size; rows of a tile stay together.

    A weight with one scale for all is one slice.
    """
    spec = target.scheme.weight
    assert spec is not None
    rows, columns = shape
    together = spec.granularity.region(rows, columns)[0]
    size = max(1, SLICE // columns // together) * together
    return tuple(slice(i, min(i + size, rows)) for i in range(0, rows, size))


def joined(parts: Sequence[QuantizedWeight], name: str) -> QuantizedWeight:
    """Return slices of rows as one weight.

    Raises:
        TunerError: the slices have a parameter of the whole weight each, and these differ.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    zero = [p.zero_point for p in parts if p.zero_point is not None]
    extra = {key: _extra([p.extra[key] for p in parts], key, name) for key in first.extra}
    return replace(
        first,
        codes=torch.cat([p.codes for p in parts], -2),
        scale=_stacked([p.scale for p in parts]),
        zero_point=torch.cat(zero, -2) if zero else None,
        extra=extra,
    )


def _extra(values: Sequence[Tensor], key: str, name: str) -> Tensor:
    if values[0].numel() > 1:
        return _stacked(values)
    if all(torch.equal(v, values[0]) for v in values[1:]):
        return values[0]
    msg = (
        f"layer {name} is too large to be quantized at once, and its data type has a {key} for "
        "the whole weight, which slices of it do not share; keep the layer in 16 bits"
    )
    raise TunerError(msg)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Return tensors one below the other; torch joins no 8-bit floats, but their bytes."""
    return torch.cat([bits(v) for v in values], -2).view(values[0].dtype)
