"""torch's own int4 and int8 products on CPUs, for everything they can be made to hold.

`aten::_weight_int4pack_mm_for_cpu` multiplies bfloat16 activations by 4-bit codes with one scale
and one float zero per group of 32, 64, 128 or 256; `aten::_weight_int8pack_mm` by int8 with one
scale per channel. Wider reach: codes below 4 bits are stored in 4 bits; groups of other sizes
repeat their scales; 8-bit groups are two planes of nibbles, that is two calls; rows are padded.

The ops have a fast loop for bfloat16 only (others are 33 times slower) and their scales are
bfloat16, so that the relative error is 2 to 3e-3. float16 activations are cast, which is said
once; a float32 model is refused, as its owner asked for more digits than these ops have.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ar_kernels.backends.base import PackedWeight
from ar_kernels.backends.reference import decode_meta, encode_meta, refuses_weight_only
from ar_kernels.backends.support import Support
from ar_kernels.layouts.nibbles import unpack_nibbles
from ar_kernels.weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ar_kernels.backends.base import Need
    from ar_schemes import TensorSpec

_log = logging.getLogger(__name__)

_GROUPS = (256, 128, 64, 32)
"""Group sizes of the int4 op."""
_ROWS = 16
"""The int4 op wants rows in multiples of this."""
_CHUNK = 1024
"""Rows packed at a time: the op that packs wants an int32 per code. A multiple of its blocks."""
_NIBBLE, _BYTE = 4, 8
_HALF = 8
"""What the int4 op subtracts from a code."""
_WIDEST = torch.bfloat16
_BLOCK = 64
"""Rows that the int4 op packs on their own (32 with AVX2): a smaller last block is packed alone."""


class CpuAten:
    """Codes in torch's order, exact to read back; computes in bfloat16."""

    name = "cpu_aten"
    status = "verified on x86-64 (AVX512), torch 2.13; untried on Arm"
    keeps_codes = True
    support = Support(
        devices=("cpu",),
        dtypes=(torch.bfloat16, torch.float16),
        widths={"int": (2, 3, 4, 8)},
        spans=("group", "channel"),
    )

    @property
    def priority(self) -> int:
        """60: faster than a float product where the CPU has AVX512, as fast with AVX2."""
        return 60

    def missing(self) -> str | None:
        """Return what torch lacks, or None."""
        ops = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
        for name in (*ops, "_weight_int8pack_mm"):
            if not hasattr(torch.ops.aten, name):
                return f"torch {torch.__version__} has no aten::{name}"
        return None

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        why = refuses_weight_only(need)
        if why is not None:
            return why
        why = self.support.refuses(need)
        if why is None and not _by_channel(need.spec) and _step(need.spec, need.columns) is None:
            why = f"groups of {_size(need.spec, need.columns)} are no multiples of {_GROUPS[-1]}"
        return why

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return the weight in the order of the ops."""
        if need.dtype == torch.float16:
            _tell_once()
        spec, columns = weight.spec, need.columns
        kept = {"scale": weight.scale}
        if weight.zero_point is not None:
            kept["zero_point"] = weight.zero_point
        kept |= {f"extra.{k}": v for k, v in weight.extra.items()}
        tail = encode_meta(spec, tuple(kept))
        if _by_channel(spec):
            signed = (weight.codes.short() - 2**7).to(torch.int8)
            buffers = {"codes": signed, "steps": weight.scale.reshape(-1).to(_WIDEST)}
            return PackedWeight(buffers | kept, (need.rows, columns, 0, *tail))
        step = _step(spec, columns)
        assert step is not None
        if spec.bits <= _NIBBLE:
            planes = [weight.codes + _lift(spec)]
        else:
            planes = [weight.codes >> 4, weight.codes & 15]
        buffers = {}
        for i, plane in enumerate(planes):
            buffers[f"codes{i}"] = _packed(plane)
            buffers[f"steps{i}"] = _steps(weight, columns, step, high=i < len(planes) - 1)
        return PackedWeight(buffers | kept, (need.rows, columns, step, *tail))

    def unpack(self, packed: PackedWeight, need: Need) -> QuantizedWeight:  # noqa: ARG002
        """Return the weight; the exact inverse of `pack`."""
        rows, columns, step, *tail = packed.meta
        spec, names = decode_meta(tuple(tail))
        held = packed.buffers
        if step == 0:
            codes = (held["codes"].short() + 2**7).to(torch.uint8)
        else:
            planes = [
                _unpacked(held[name], rows, columns) for name in held if name.startswith("codes")
            ]
            codes = planes[0] << 4 | planes[1] if len(planes) > 1 else planes[0] - _lift(spec)
        return QuantizedWeight.from_tensors(spec, {"codes": codes, **{k: held[k] for k in names}})

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        spec, names = decode_meta(tuple(meta[3:]))
        if meta[2] == 0:
            return ("codes", "steps", *names)
        planes = range(1 if spec.bits <= _NIBBLE else 2)
        return (*(f"{kind}{i}" for i in planes for kind in ("codes", "steps")), *names)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x.

        Computed in bfloat16.
        """
        rows, columns, step = packed.meta[:3]
        flat = x.reshape(-1, columns).to(_WIDEST).contiguous()
        held = packed.buffers
        if step == 0:
            out = torch.ops.aten._weight_int8pack_mm(flat, held["codes"], held["steps"])  # noqa: SLF001
        else:
            out = _int4(flat, held["codes0"], held["steps0"], step)
            if "codes1" in held:
                # summed in float32: the planes cancel in part
                low = _int4(flat, held["codes1"], held["steps1"], step)
                out = out.float() + low.float()
            out = out[:, :rows]
        if bias is not None:
            out = out + bias
        out = out.to(x.dtype).reshape(*x.shape[:-1], rows)
        return out if out.is_contiguous() else out.contiguous()


@functools.cache
def _tell_once() -> None:
    _log.warning(
        "cpu_aten computes float16 layers in bfloat16 (relative error 3e-3 instead of 3e-4); "
        "AR_BACKEND=dense keeps float16"
    )


def _size(spec: TensorSpec, columns: int) -> int:
    return spec.granularity.region(1, columns)[1]


def _by_channel(spec: TensorSpec) -> bool:
    """Tell whether the int8 op serves a spec as it is."""
    return spec.bits == _BYTE and spec.symmetric and spec.granularity.span == "channel"


def _step(spec: TensorSpec, columns: int) -> int | None:
    """Return the largest group size of the op that divides the group, or None."""
    size = _size(spec, columns)
    return next((g for g in _GROUPS if size % g == 0), None)


def _lift(spec: TensorSpec) -> int:
    """Return what is added to codes below 4 bits, so that their middle is the op's.

    A zero far from it would be rounded to bfloat16 at a multiple of the scale (measured: relative
    error 2e-2 at 2 bits instead of 2e-3).
    """
    return _HALF - 2 ** (spec.bits - 1)


def _packed(codes: Tensor) -> Tensor:
    """Return codes [O, I] below 16 as the op wants them: uint8 [O padded, I / 2]."""
    parts = []
    for start in range(0, codes.shape[0], _CHUNK):
        part = codes[start : start + _CHUNK].int()
        short = -part.shape[0] % _ROWS
        part = functional.pad(part, (0, 0, 0, short)).contiguous()
        parts.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 1))  # noqa: SLF001
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _steps(weight: QuantizedWeight, columns: int, step: int, *, high: bool) -> Tensor:
    """Return scale and zero of every group of `step` for one plane, bfloat16 [G, O padded, 2].

    The op computes (code - 8) * scale + zero.
    """
    spec = weight.spec
    scale = weight.scale.float()
    middle = 2 ** (spec.bits - 1)
    point = torch.full_like(scale, middle) if weight.zero_point is None else weight.zero_point
    if spec.bits <= _NIBBLE:
        factor, zero = scale, (_HALF - _lift(spec) - point.float()) * scale
    elif high:  # 16 * (c - 8) * s + (128 - z) * s
        factor, zero = 16 * scale, (2**7 - point.float()) * scale
    else:  # (c - 8) * s + 8 * s
        factor, zero = scale, _HALF * scale
    both = torch.stack([factor, zero], -1).to(_WIDEST)
    wide = both.repeat_interleave(_size(spec, columns) // step, dim=1).transpose(0, 1)
    return functional.pad(wide, (0, 0, 0, -wide.shape[1] % _ROWS)).contiguous()


def _int4(x: Tensor, codes: Tensor, steps: Tensor, step: int) -> Tensor:
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, step, steps)  # noqa: SLF001
    return out


def _unpacked(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Return the codes [O, I] of a plane."""
    out = torch.empty(len(packed), columns, dtype=torch.uint8)
    whole = len(packed) // _BLOCK * _BLOCK
    parts = [(start, min(start + _CHUNK, whole)) for start in range(0, whole, _CHUNK)]
    for first, end in [*parts, (whole, len(packed))]:
        high = min(_BLOCK, end - first)
        if high:
            flat = unpack_nibbles(packed[first:end]).view(-1, high * columns)
            out[first:end] = flat.index_select(1, _places(high, columns)).view(-1, columns)
    return out[:rows]


@functools.lru_cache(maxsize=8)
def _places(rows: int, columns: int) -> Tensor:
    """Return where the op puts each code of a block of rows, int64 [O * I].

    Its order depends on the CPU, so the op itself is asked: it packs the number of each code, four
    bits at a time.
    """
    number = torch.arange(rows * columns)
    found = torch.zeros_like(number)
    for shift in range(0, len(number).bit_length(), _NIBBLE):
        digit = (number >> shift & 15).int().view(rows, columns)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(digit, 1)  # noqa: SLF001
        found |= unpack_nibbles(packed).view(-1).long() << shift
    return torch.empty_like(number).scatter_(0, found, number)
