"""What the backends on other people's 4-bit kernels have in common.

Those kernels know integers of 4 bits with one scale and one zero point a group; narrower integers
are stored in 4 bits, and groups they do not know are split into groups they know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels.backends.reference import refuses_weight_only
from ar_kernels.weight import QuantizedWeight
from ar_schemes import Span

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_kernels.backends.base import Need
    from ar_schemes import TensorSpec


@dataclass(frozen=True)
class Parts:
    """An integer weight [O, I] taken apart.

    Attributes:
        codes: uint8 [O, I], at most 4 bits.
        scale: [G, O], as the weight holds it.
        zero: uint8 [G, O], codes that stand for 0.0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def refuses(need: Need, *, groups: Sequence[int], bits: Sequence[int] = (2, 3, 4)) -> str | None:
    """Return why such a kernel cannot serve a layer, or None.

    Args:
        need: what the layer asks.
        groups: group sizes the kernel knows.
        bits: widths it takes.
    """
    why = refuses_weight_only(need)
    if why is not None:
        return why
    spec = need.spec
    if spec.data_type != "int" or spec.bits not in bits or spec.super_group is not None:
        return f"multiplies int of {_listed(bits)} bits only, not {spec}"
    if spec.granularity.span not in (Span.GROUP, Span.CHANNEL):
        return f"has a scale per group or channel, not per {spec.granularity.span}"
    if split_group(spec, need.columns, groups) is None:
        return (
            f"the group size {spec.granularity.region(1, need.columns)[1]} is no multiple of "
            f"{_listed(sorted(groups))}"
        )
    return None


def split_group(spec: TensorSpec, columns: int, groups: Sequence[int]) -> int | None:
    """Return the largest group size a kernel knows that divides that of the spec, or None."""
    size = spec.granularity.region(1, columns)[1]
    return max((g for g in groups if size % g == 0), default=None)


def parts(weight: QuantizedWeight, group: int) -> Parts:
    """Return a weight taken apart, scales repeated for groups of `group` columns."""
    zero = weight.zero_point
    if zero is None:
        half = 2 ** (weight.spec.bits - 1)
        zero = torch.full_like(weight.scale, half, dtype=torch.uint8)
    times = weight.shape[1] // group // weight.scale.shape[1]
    scale, zero = (t.repeat_interleave(times, 1).t().contiguous() for t in (weight.scale, zero))
    return Parts(weight.codes, scale, zero)


def joined(found: Parts, spec: TensorSpec) -> QuantizedWeight:
    """Return the weight that was taken apart; the exact inverse of `parts`."""
    groups = spec.granularity.scale_shape(*found.codes.shape)[1]
    every = found.scale.shape[0] // groups
    scale, zero = (t[::every].t().contiguous() for t in (found.scale, found.zero))
    return QuantizedWeight(spec, found.codes, scale, None if spec.symmetric else zero)


def nibbles(codes: Tensor) -> Tensor:
    """Return codes [.., n] two a byte, the first in the low half: uint8 [.., n / 2]."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous()


def from_nibbles(packed: Tensor) -> Tensor:
    """Return the inverse of `nibbles`."""
    return torch.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def words(codes: Tensor) -> Tensor:
    """Return codes [.., n] eight an int32, the first in the lowest bits: [.., n / 8]."""
    packed = nibbles(codes)
    return packed.flatten().view(torch.int32).view(*packed.shape[:-1], -1)


def from_words(packed: Tensor) -> Tensor:
    """Return the inverse of `words`."""
    flat = packed.flatten().view(torch.uint8)
    return from_nibbles(flat.view(*packed.shape[:-1], -1))


def with_scale(scale: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the scale in the type a kernel wants, and as it was where that lost bits."""
    cast = scale.to(dtype)
    same = torch.equal(cast.to(scale.dtype), scale)
    return {"scale": cast} if same else {"scale": cast, "stored_scale": scale}


def stored_scale(buffers: Mapping[str, Tensor], spec: TensorSpec) -> Tensor:
    """Return the scale as the weight held it."""
    kept = buffers.get("stored_scale")
    return buffers["scale"].to(getattr(torch, spec.scale_dtype)) if kept is None else kept


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
