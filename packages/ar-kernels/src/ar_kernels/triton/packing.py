"""How a quantized weight lies in memory for the Triton kernels, and which specs can."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels.triton.words import PLANES, SLICE, fields, pack_words, tiles, unpack_words
from ar_kernels.weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_schemes import TensorSpec

INT, E4M3, E2M1, E2M3 = range(4)
"""Elements: what a code stands for."""
FLOAT, E8M0, SCALE_E4M3, UE5M3 = range(4)
"""Scales: a float type as it is, or the bits of an 8-bit float."""
_STORED = {
    E8M0: torch.float8_e8m0fnu,
    SCALE_E4M3: torch.float8_e4m3fn,
    UE5M3: torch.uint8,
}
_ELEMENTS = {
    ("fp", 8): E4M3,
    ("mx_fp", 4): E2M1,
    ("mx_fp", 6): E2M3,
    ("mx_fp", 8): E4M3,
    ("mx_fp_rceil", 4): E2M1,
    ("mx_fp_rceil", 6): E2M3,
    ("mx_fp_rceil", 8): E4M3,
    ("mx_int", 4): INT,
    ("nv_fp", 4): E2M1,
    ("nv_fp4_with_static_gs", 4): E2M1,
    ("nvfp4_v2", 4): E2M1,
}
WIDTHS: dict[str, tuple[int, ...]] = {
    "int": tuple(PLANES),
    **{name: tuple(b for n, b in _ELEMENTS if n == name) for name, _ in _ELEMENTS},
}
"""Data types to the widths that can be packed."""
_SCALES = {"e8m0": E8M0, "float8_e4m3fn": SCALE_E4M3, "ue5m3": UE5M3}
_PLAIN = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Packing:
    """What the kernels must know of a packed weight [O, I]; all integers, the op's `meta`.

    Attributes:
        bits: width of a code.
        rows: O.
        columns: I.
        group: columns that share a scale; I for one scale per row.
        element: what a code stands for.
        scale: how scales are stored.
        steps: whether an integer counts quarters (`mx_int`).
        asymmetric: whether there are zero points.
        whole: whether a scale of the whole tensor divides the result.
    """

    bits: int
    rows: int
    columns: int
    group: int
    element: int
    scale: int
    steps: int
    asymmetric: int
    whole: int

    @classmethod
    def of(cls, spec: TensorSpec, rows: int, columns: int) -> Packing:
        """Return the packing of a spec that `refuses` has no word against."""
        element = INT if spec.data_type == "int" else _ELEMENTS[spec.data_type, spec.bits]
        return cls(
            bits=spec.bits,
            rows=rows,
            columns=columns,
            group=spec.granularity.region(rows, columns)[1],
            element=element,
            scale=_SCALES.get(spec.scale_dtype, FLOAT),
            steps=int(spec.data_type == "mx_int"),
            asymmetric=int(not spec.symmetric),
            whole=int(spec.data_type.startswith("nv_fp")),
        )

    @classmethod
    def from_meta(cls, meta: Sequence[int]) -> Packing:
        """Return the packing whose `meta()` this is."""
        return cls(*meta)

    def meta(self) -> tuple[int, ...]:
        """Return it as integers."""
        return astuple(self)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the buffers, in order."""
        optional = (
            ("high", PLANES[self.bits][1]),
            ("zero", self.asymmetric),
            ("whole", self.whole),
        )
        return ("words", "scale", *(name for name, there in optional if there))

    @property
    def tiles(self) -> int:
        """Tiles of columns, the last one filled up."""
        return tiles(self.columns, self.bits)

    @property
    def groups(self) -> int:
        """Scales in one row of the weight."""
        return self.columns // self.group

    @property
    def slices(self) -> int:
        """Runs of 16 columns that share a scale; past the end for one scale per row."""
        return self.tiles * fields(self.bits) if self.groups == 1 else self.group // SLICE

    @property
    def together(self) -> int:
        """Neighbouring fields of every tile that share a scale."""
        return math.gcd(self.slices, fields(self.bits))

    @property
    def zero(self) -> int:
        """Code that stands for 0.0 where there are no zero points; 0 for floats."""
        return 2 ** (self.bits - 1) if self.element == INT and not self.asymmetric else 0

    @property
    def factor(self) -> float:
        """What decoded elements are multiplied by: floats are decoded with half's exponent bias."""
        if self.element == INT:
            return 0.25 if self.steps else 1.0
        return {E4M3: 2.0**8, E2M1: 2.0**14, E2M3: 2.0**14}[self.element]


def refuses(spec: TensorSpec, rows: int, columns: int) -> str | None:
    """Return why a weight cannot be packed for these kernels, or None."""
    integer = spec.data_type == "int" and spec.bits in PLANES
    if not integer and (spec.data_type, spec.bits) not in _ELEMENTS:
        return f"no kernel for {spec.data_type} of {spec.bits} bits"
    if spec.super_group is not None:
        return "no kernel for scales that are quantized themselves"
    if spec.scale_dtype not in (*_SCALES, *_PLAIN):
        return f"no kernel for {spec.scale_dtype} scales"
    group = spec.granularity.region(rows, columns)[1]
    if group != columns and group % SLICE:
        return f"the group size must be a multiple of {SLICE}, not {group}"
    return None


def pack(weight: QuantizedWeight) -> tuple[Packing, dict[str, Tensor]]:
    """Return how a weight [O, I] is packed, and its buffers on its device.

    `words` [tiles * 16, O] int32, `scale` [G, O], and where they exist `high` [tiles * 16, O],
    `zero` uint8 [G, O] and `whole` float32 [1, 1].
    """
    rows, columns = weight.shape
    packing = Packing.of(weight.spec, rows, columns)
    words, high = pack_words(weight.codes, weight.spec.bits)
    bits = weight.scale if packing.scale == FLOAT else weight.scale.view(torch.uint8)
    found: dict[str, Tensor | None] = {
        "words": words,
        "scale": _spread(bits, rows),
        "high": high,
        "zero": None if weight.zero_point is None else _spread(weight.zero_point, rows),
        "whole": weight.extra.get("global_scale"),
    }
    buffers: dict[str, Tensor] = {}
    for name in packing.names:
        tensor = found[name]
        assert tensor is not None, name
        buffers[name] = tensor
    return packing, buffers


def unpack(packing: Packing, buffers: Mapping[str, Tensor], spec: TensorSpec) -> QuantizedWeight:
    """Return the weight; the exact inverse of `pack`, ranges of activations left out."""
    codes = unpack_words(buffers["words"], buffers.get("high"), packing.bits, packing.columns)
    every = spec.granularity.region(packing.rows, packing.columns)[0]
    scale = buffers["scale"].t()[::every].contiguous()
    zero = buffers.get("zero")
    extra = {"global_scale": buffers["whole"]} if packing.whole else {}
    return QuantizedWeight(
        spec=spec,
        codes=codes,
        scale=scale if packing.scale == FLOAT else scale.view(_STORED[packing.scale]),
        zero_point=None if zero is None else zero.t()[::every].contiguous(),
        extra=extra,
    )


def _spread(values: Tensor, rows: int) -> Tensor:
    """Return [R, G] as [G, O]: a value per row of the weight, neighbours for neighbouring rows."""
    return values.repeat_interleave(rows // values.shape[0], dim=0).t().contiguous()
