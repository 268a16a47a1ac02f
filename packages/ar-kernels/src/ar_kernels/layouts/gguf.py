"""The block layouts of GGUF: `blocks` uint8 [O, bytes per row], each block parameters and codes.

Names follow ggml: q4_0 to q8_0 are blocks of 32, the K types blocks of 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels.layouts.base import TensorFact
from ar_kernels.layouts.checks import require, require_holds
from ar_kernels.layouts.gguf_fields import (
    bytes_half,
    half_bytes,
    pack_planes,
    pack_scales_min,
    pack_scales_q3,
    unpack_planes,
    unpack_scales_min,
    unpack_scales_q3,
)
from ar_kernels.layouts.ordering import require_natural_order
from ar_kernels.weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from ar_schemes import TensorSpec

    Fields = dict[str, Tensor]

_SUPER = 256
_SIGN = 128


@dataclass(frozen=True)
class GgufLayout:
    """A type of GGUF.

    Attributes:
        type: its name there, `Q4_K`.
        data_type, bits, group: of the specs it holds.
        block: elements in a block.
        size: bytes in a block.
        fields: names and bytes of the parts of a block, in order.
        encode: fields of a weight, each [O, blocks, bytes].
        decode: parts of a `QuantizedWeight` from the fields.
    """

    type: str
    data_type: str
    bits: int
    group: int
    block: int
    fields: tuple[tuple[str, int], ...]
    encode: Callable[[QuantizedWeight], Fields]
    decode: Callable[[Fields], Fields]

    @property
    def name(self) -> str:
        """Identifier, `gguf_q4_k`."""
        return f"gguf_{self.type.lower()}"

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return sum(count for _, count in self.fields)

    def matches(self, spec: TensorSpec) -> bool:
        """Tell whether a spec is of this type."""
        return (
            (spec.data_type, spec.bits) == (self.data_type, self.bits)
            and spec.granularity.group_size == self.group
            and spec.symmetric is (self.data_type in ("int", "int_sym_dq"))
        )

    def refuses(self, spec: TensorSpec, rows: int, columns: int) -> str | None:  # noqa: ARG002
        """Return why a weight cannot be packed so, or None."""
        if not self.matches(spec):
            return f"{self.type} holds {self.data_type}{self.bits} group{self.group}, not {spec}"
        if spec.scale_dtype != "float16":
            return f"{self.type} holds scales in float16, not {spec.scale_dtype}"
        if columns % self.block:
            return f"{columns} input features are not a multiple of {self.block} ({self.type})"
        return None

    def facts(self, spec: TensorSpec, rows: int, columns: int) -> dict[str, TensorFact]:  # noqa: ARG002
        """Return the shape and type of the blocks."""
        return {"blocks": TensorFact((rows, columns // self.block * self.size), torch.uint8)}

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return `blocks`.

        Raises:
            KernelError: the weight does not fit.
        """
        rows, columns = weight.shape[-2:]
        require_holds(self, weight.spec, rows, columns)
        require_natural_order(self.name, weight)
        made = self.encode(weight)
        parts = [made[name] for name, _ in self.fields]
        return {"blocks": torch.cat(parts, -1).reshape(rows, -1).contiguous()}

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, rows: int, columns: int
    ) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`.

        Raises:
            KernelError: the blocks are missing or do not fit.
        """
        require(self, tensors, spec, rows, columns)
        raw = tensors["blocks"].reshape(rows, -1, self.size)
        cut = torch.split(raw, [count for _, count in self.fields], -1)
        found = self.decode(dict(zip((name for name, _ in self.fields), cut, strict=True)))
        parts = {name: tensor.reshape(rows, -1).contiguous() for name, tensor in found.items()}
        return QuantizedWeight(spec, parts.pop("codes"), parts.pop("scale"), extra=parts)


def _blocks(weight: QuantizedWeight, block: int) -> Tensor:
    return weight.codes.unflatten(-1, (-1, block))


def _per_block(values: Tensor, count: int) -> Tensor:
    return values.unflatten(-1, (-1, count))


def _nibbles(codes: Tensor) -> Tensor:
    """Return codes [..., 32] as bytes [..., 16]: first half low, second half high."""
    return pack_planes((codes & 15).unflatten(-1, (2, 16)), 4)


def _unnibbles(raw: Tensor) -> Tensor:
    return unpack_planes(raw, 4, 2).flatten(-2)


def _high_bits(codes: Tensor) -> Tensor:
    """Return bit 4 of codes [..., 32] as four bytes, element i at bit i."""
    bits = (codes >> 4).unflatten(-1, (4, 8)).transpose(-1, -2)
    return pack_planes(bits, 1)


def _unhigh_bits(raw: Tensor) -> Tensor:
    return unpack_planes(raw, 1, 8).transpose(-1, -2).flatten(-2) << 4


def _encode_32(weight: QuantizedWeight) -> Fields:
    codes, bits = _blocks(weight, 32), weight.spec.bits
    out = {"d": half_bytes(_per_block(weight.scale, 1))}
    if "minimum" in weight.extra:
        out["m"] = half_bytes(_per_block(weight.extra["minimum"], 1))
    if bits == 8:  # noqa: PLR2004
        return out | {"qs": codes ^ _SIGN}  # two's complement of code - 128
    return out | {"qs": _nibbles(codes), "qh": _high_bits(codes)}


def _decode_32(fields: Fields) -> Fields:
    out = {"scale": bytes_half(fields["d"])}
    if "m" in fields:
        out["minimum"] = bytes_half(fields["m"])
    if fields["qs"].shape[-1] == 32:  # noqa: PLR2004
        return out | {"codes": fields["qs"] ^ _SIGN}
    codes = _unnibbles(fields["qs"])
    return out | {"codes": codes | _unhigh_bits(fields["qh"]) if "qh" in fields else codes}


def _two_bits(codes: Tensor) -> Tensor:
    """Return the low two bits of codes [..., 256] as 64 bytes: four runs of 32 per byte plane."""
    return pack_planes((codes & 3).unflatten(-1, (2, 4, 32)), 2).flatten(-2)


def _untwo_bits(raw: Tensor) -> Tensor:
    return unpack_planes(raw.unflatten(-1, (2, 32)), 2, 4).flatten(-3)


def _runs(codes: Tensor) -> Tensor:
    """Return the low nibbles of codes [..., 256] as 128 bytes: pairs of runs of 32."""
    return pack_planes((codes & 15).unflatten(-1, (4, 2, 32)), 4).flatten(-2)


def _unruns(raw: Tensor) -> Tensor:
    return unpack_planes(raw.unflatten(-1, (4, 32)), 4, 2).flatten(-3)


def _supers(weight: QuantizedWeight) -> Fields:
    out = {"d": half_bytes(_per_block(weight.extra["super_scale"], 1))}
    if "super_minimum" in weight.extra:
        out["dmin"] = half_bytes(_per_block(weight.extra["super_minimum"], 1))
    return out


def _unsupers(fields: Fields) -> Fields:
    out = {"super_scale": bytes_half(fields["d"])}
    if "dmin" in fields:
        out["super_minimum"] = bytes_half(fields["dmin"])
    return out


def _encode_q2(weight: QuantizedWeight) -> Fields:
    scale, minimum = (_per_block(t, 16) for t in (weight.scale, weight.extra["minimum"]))
    codes = _blocks(weight, _SUPER)
    return _supers(weight) | {"scales": scale | minimum << 4, "qs": _two_bits(codes)}


def _decode_q2(fields: Fields) -> Fields:
    raw = fields["scales"]
    return _unsupers(fields) | {
        "codes": _untwo_bits(fields["qs"]),
        "scale": raw & 15,
        "minimum": raw >> 4,
    }


def _encode_q3(weight: QuantizedWeight) -> Fields:
    codes = _blocks(weight, _SUPER)
    shifted = (_per_block(weight.scale, 16).short() + 32).to(torch.uint8)
    return _supers(weight) | {
        "hmask": pack_planes((codes >> 2).unflatten(-1, (8, 32)), 1),
        "qs": _two_bits(codes),
        "scales": pack_scales_q3(shifted),
    }


def _decode_q3(fields: Fields) -> Fields:
    high = unpack_planes(fields["hmask"], 1, 8).flatten(-2)
    return _unsupers(fields) | {
        "codes": _untwo_bits(fields["qs"]) | high << 2,
        "scale": (unpack_scales_q3(fields["scales"]).short() - 32).to(torch.int8),
    }


def _encode_q45(weight: QuantizedWeight) -> Fields:
    codes = _blocks(weight, _SUPER)
    scale, minimum = (_per_block(t, 8) for t in (weight.scale, weight.extra["minimum"]))
    return _supers(weight) | {
        "scales": pack_scales_min(scale, minimum),
        "qs": _runs(codes),
        "qh": pack_planes((codes >> 4).unflatten(-1, (8, 32)), 1),
    }


def _decode_q45(fields: Fields) -> Fields:
    codes = _unruns(fields["qs"])
    if "qh" in fields:
        codes = codes | unpack_planes(fields["qh"], 1, 8).flatten(-2) << 4
    scale, minimum = unpack_scales_min(fields["scales"])
    return _unsupers(fields) | {"codes": codes, "scale": scale, "minimum": minimum}


def _encode_q6(weight: QuantizedWeight) -> Fields:
    runs = _blocks(weight, _SUPER).unflatten(-1, (2, 2, 2, 32))  # half, low or high, even or odd
    return _supers(weight) | {
        "ql": pack_planes((runs & 15).transpose(-3, -2), 4).flatten(-3),
        "qh": pack_planes((runs >> 4).flatten(-3, -2), 2).flatten(-2),
        "scales": _per_block(weight.scale, 16).contiguous().view(torch.uint8),
    }


def _decode_q6(fields: Fields) -> Fields:
    low = unpack_planes(fields["ql"].unflatten(-1, (2, 2, 32)), 4, 2).transpose(-3, -2)
    high = unpack_planes(fields["qh"].unflatten(-1, (2, 32)), 2, 4).flatten(-3)
    return _unsupers(fields) | {
        "codes": low.flatten(-4) | high << 4,
        "scale": fields["scales"].contiguous().view(torch.int8),
    }


_ASYM, _SYM, _FLOAT = "int_asym_dq", "int_sym_dq", "int_asym_float_zp"
_D, _M = ("d", 2), ("m", 2)
GGUF_LAYOUTS = (
    GgufLayout("Q4_0", "int", 4, 32, 32, (_D, ("qs", 16)), _encode_32, _decode_32),
    GgufLayout("Q4_1", _FLOAT, 4, 32, 32, (_D, _M, ("qs", 16)), _encode_32, _decode_32),
    GgufLayout("Q5_0", "int", 5, 32, 32, (_D, ("qh", 4), ("qs", 16)), _encode_32, _decode_32),
    GgufLayout("Q5_1", _FLOAT, 5, 32, 32, (_D, _M, ("qh", 4), ("qs", 16)), _encode_32, _decode_32),
    GgufLayout("Q8_0", "int", 8, 32, 32, (_D, ("qs", 32)), _encode_32, _decode_32),
    GgufLayout(
        *("Q2_K", _ASYM, 2, 16, _SUPER),
        (("scales", 16), ("qs", 64), _D, ("dmin", 2)),
        *(_encode_q2, _decode_q2),
    ),
    GgufLayout(
        *("Q3_K", _SYM, 3, 16, _SUPER),
        (("hmask", 32), ("qs", 64), ("scales", 12), _D),
        *(_encode_q3, _decode_q3),
    ),
    GgufLayout(
        *("Q4_K", _ASYM, 4, 32, _SUPER),
        (_D, ("dmin", 2), ("scales", 12), ("qs", 128)),
        *(_encode_q45, _decode_q45),
    ),
    GgufLayout(
        *("Q5_K", _ASYM, 5, 32, _SUPER),
        (_D, ("dmin", 2), ("scales", 12), ("qh", 32), ("qs", 128)),
        *(_encode_q45, _decode_q45),
    ),
    GgufLayout(
        *("Q6_K", _SYM, 6, 16, _SUPER),
        (("ql", 128), ("qh", 64), ("scales", 16), _D),
        *(_encode_q6, _decode_q6),
    ),
)


def gguf_type(spec: TensorSpec) -> str | None:
    """Return the name of the GGUF type that a spec is, or None."""
    return next((found.type for found in GGUF_LAYOUTS if found.matches(spec)), None)
