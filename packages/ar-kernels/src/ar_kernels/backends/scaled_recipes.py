"""Which pairs of weights and activations `torch.nn.functional.scaled_mm` multiplies, and how.

Scales of blocks of 32 and 16 columns come in the order that NVIDIA's tensor cores read
(`swizzled`); activations are quantized with torch operations that a graph can capture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from torch.nn.functional import ScalingType, SwizzleType

from ar_schemes import Granularity, Span

if TYPE_CHECKING:
    from torch import Tensor

    from ar_schemes import TensorSpec

_GROUP = {n: Granularity(Span.GROUP, (n,)) for n in (16, 32, 128)}
_TENSOR, _CHANNEL, _TOKEN = (Granularity(s) for s in (Span.TENSOR, Span.CHANNEL, Span.TOKEN))
_MX = ("mx_fp", "mx_fp_rceil")
_NV = ("nv_fp", "nv_fp4_with_static_gs")


@dataclass(frozen=True)
class Recipe:
    """One way of multiplying.

    Attributes:
        name: identifier.
        types: data types of both operands.
        bits: width of both.
        pairs: granularities (weight, activations) it takes.
        kinds: torch's names for the scales of activations and weight.
        oldest: compute capability it needs.
        newest: compute capability up to which it exists, None: no end.
        multiple: what rows and columns must be multiples of.
    """

    name: str
    types: tuple[str, ...]
    bits: int
    pairs: tuple[tuple[Granularity, Granularity], ...]
    kinds: tuple[ScalingType, ScalingType]
    oldest: tuple[int, int]
    newest: tuple[int, int] | None = None
    multiple: int = 16


RECIPES = (
    Recipe(
        "tensor",
        ("fp",),
        8,
        ((_TENSOR, _TENSOR),),
        (ScalingType.TensorWise, ScalingType.TensorWise),
        (8, 9),
    ),
    Recipe(
        "row",
        ("fp",),
        8,
        ((_CHANNEL, _TOKEN), (_CHANNEL, _TENSOR), (_TENSOR, _TOKEN)),
        (ScalingType.RowWise, ScalingType.RowWise),
        (8, 9),
    ),
    Recipe(
        "block",
        ("fp",),
        8,
        ((Granularity(Span.TILE, (128, 128)), _GROUP[128]),),
        (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128),
        (9, 0),
        (9, 0),
        128,
    ),
    Recipe(
        "mx",
        _MX,
        8,
        ((_GROUP[32], _GROUP[32]),),
        (ScalingType.BlockWise1x32, ScalingType.BlockWise1x32),
        (10, 0),
        multiple=32,
    ),
    Recipe(
        "nv",
        _NV,
        4,
        ((_GROUP[16], _GROUP[16]),),
        (ScalingType.BlockWise1x16, ScalingType.BlockWise1x16),
        (10, 0),
        multiple=32,
    ),
)
"""The table. torch's own checks in ScaledBlas.cpp are the source of shapes and capabilities."""


def recipe_of(spec: TensorSpec, activation: TensorSpec) -> Recipe | None:
    """Return how a weight and activations are multiplied, None when torch has no way."""
    for recipe in RECIPES:
        alike = all(
            s.data_type in recipe.types and s.bits == recipe.bits for s in (spec, activation)
        )
        activations = activation.granularity
        if activations.span is Span.CHANNEL:  # a row of activations is a token
            activations = _TOKEN
        if alike and (spec.granularity, activations) in recipe.pairs:
            return recipe
    return None


def quantized_input(
    x: Tensor, spec: TensorSpec, static: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (codes, scale, tensor scale or None) of activations [M, I].

    Codes are float8_e4m3fn [M, I] or two 4-bit codes a byte [M, I / 2]; scale is float32 for
    `fp` ([M, 1], [1, 1] or [M, G]), e8m0 or e4m3 [M, G] else.

    Args:
        x: activations.
        spec: how they are represented.
        static: float32 [1]: the step, or for NVFP4 the tensor scale, collected beforehand.
    """
    from ar_kernels.registry import data_type  # the registry holds the backends

    kind, rows = data_type(spec.data_type), x.float()
    if spec.data_type == "fp":
        scale = static.reshape(1, 1) if static is not None else kind.parameters(rows, spec).scale
        return _e4m3(rows, scale), scale, None
    if spec.data_type in _MX:
        power = kind.parameters(rows, spec).scale
        return _e4m3(rows, power), power.to(torch.float8_e8m0fnu), None
    shared = None if static is None else {"global_scale": static.reshape(1, 1)}
    params = kind.parameters(rows, spec, shared=shared)
    codes = e2m1_codes(rows / params.scale.repeat_interleave(16, -1))
    block, whole = params.extra["block_scale"], params.extra["global_scale"]
    return pairs(codes), block.to(torch.float8_e4m3fn), whole


def _e4m3(rows: Tensor, scale: Tensor) -> Tensor:
    wide = (
        scale
        if scale.shape[1] == 1
        else scale.repeat_interleave(rows.shape[1] // scale.shape[1], 1)
    )
    return (rows / wide).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def e2m1_codes(values: Tensor) -> Tensor:
    """Return the nearest 4-bit codes, ties to even, as uint8; without tables, for graphs."""
    size = values.abs()
    code = (size > 0.25).to(torch.uint8)
    for bound, closed in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True)):
        code += size >= bound if closed else size > bound
    code += size > 5.0  # noqa: PLR2004 - between 4 and 6
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def pairs(codes: Tensor) -> Tensor:
    """Return 4-bit codes [.., I] two a byte, the first in the low half: [.., I / 2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpaired(packed: Tensor) -> Tensor:
    """Return the inverse of `pairs`."""
    return torch.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def swizzled(scale: Tensor) -> Tensor:
    """Return 8-bit scales [R, G] in tiles of 128 rows and 4 groups, flat, filled up with zeros.

    Within a tile, row `32 * b + a` and group `c` lie at `16 * a + 4 * b + c`.
    """
    rows, groups = scale.shape
    bits = functional.pad(scale.view(torch.uint8), (0, -groups % 4, 0, -rows % 128))
    tiles = bits.view(bits.shape[0] // 128, 4, 32, bits.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().view(scale.dtype).flatten()


def unswizzled(flat: Tensor, rows: int, groups: int) -> Tensor:
    """Return the inverse of `swizzled`, [rows, groups]."""
    high, wide = -(-rows // 128), -(-groups // 4)
    tiles = flat.view(torch.uint8).view(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    whole = tiles.reshape(high * 128, wide * 4)[:rows, :groups]
    return whole.contiguous().view(flat.dtype)


SWIZZLE = SwizzleType.SWIZZLE_32_4_4
"""What torch calls the order of `swizzled`."""
