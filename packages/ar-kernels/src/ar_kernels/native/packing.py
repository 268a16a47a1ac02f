"""`QuantizedWeight` into the blob that the CPU kernels read, and back to the bit.

A blob is a header and one record for each 64 features; weights of one format are joined by putting
their records one after the other, either as more features (layers with the same input) or as more
weights (experts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.native import library as lib
from ar_kernels.native.storage import TABLE, exact_in_bf16, group, storage, table
from ar_kernels.weight import KernelError, QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_schemes import TensorSpec

STRIP = 64
"""Features of a record."""
ROWS, COLUMNS, GROUP, _BITS, _KIND, _SCALE, _ZERO, COUNT, FLAGS = range(9)
"""Places of the integers of a meta: the eight that C reads, then flags."""
ONLY_FLOAT32, TWO_LEVELS = 1, 2
"""Flags: bf16 does not hold the table exactly; the weight has a tensor scale."""


def meta(spec: TensorSpec, rows: int, columns: int) -> tuple[int, ...]:
    """Return the integers that describe a weight [rows, columns]."""
    kept, inputs = storage(spec), group(spec, columns)
    flags = (0 if exact_in_bf16(spec) else ONLY_FLOAT32) | (TWO_LEVELS if kept.extra else 0)
    scale = kept.scale if inputs else 0
    return (rows, columns, inputs, kept.bits, kept.kind, scale, int(kept.has_zero), 1, flags)


def pack(weight: QuantizedWeight) -> tuple[Tensor, tuple[int, ...]]:
    """Return (blob, meta) of a weight [O, I]; the blob is uint8 on the CPU.

    Raises:
        KernelError: the library is not there.
    """
    spec, kept = weight.spec, storage(weight.spec)
    rows, columns = weight.shape
    numbers = meta(spec, rows, columns)
    sizes = lib.sizes(numbers)
    blob = torch.zeros(sizes.all, dtype=torch.uint8)
    header = blob[: sizes.header].view(torch.float32)
    header[:TABLE] = table(spec)
    header[TABLE] = kept.zero_bias
    records = blob[sizes.header :].view(-1, sizes.record)
    factors = torch.ones(rows, 1)
    if numbers[GROUP]:
        scales, zeros = _leads(blob, numbers)
        _write(scales, _expanded(weight.scale, weight, numbers))
        if weight.zero_point is not None:
            _write(zeros, _expanded(weight.zero_point, weight, numbers) + kept.offset)
    else:
        factors = weight.scale.float().expand(rows, 1)
    for name in kept.extra:
        factors = factors / weight.extra[name].reshape(1, 1)
    _write(records[:, None, : STRIP * 4], factors.contiguous())
    codes = (weight.codes + kept.offset if kept.offset else weight.codes).contiguous()
    lib.check(
        lib.library().ar_pack(
            *(lib.runtime(), lib.integers(numbers)),
            *(codes.data_ptr(), codes.numel(), blob.data_ptr(), blob.numel()),
        )
    )
    return blob, numbers


def unpack(
    blob: Tensor, numbers: Sequence[int], spec: TensorSpec, extra: Mapping[str, Tensor]
) -> QuantizedWeight:
    """Return the weight that `pack` was given; `extra` are its further parameters.

    Raises:
        KernelError: the blob is not one of that format.
    """
    kept, numbers = storage(spec), tuple(numbers)
    rows, columns = numbers[ROWS], numbers[COLUMNS]
    sizes = lib.sizes(numbers)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    packed = lib.weight(blob, numbers)
    lib.check(lib.library().ar_unpack(lib.runtime(), packed, codes.data_ptr(), codes.numel()))
    records = blob[sizes.header :].view(-1, sizes.record)
    high, wide = spec.granularity.region(rows, columns)
    zero = None
    if numbers[GROUP]:
        wide = max(1, wide // numbers[GROUP])
        groups = -(-columns // numbers[GROUP])
        scales, zeros = _leads(blob, numbers)
        scale = _read(scales, kept.scale_dtype, rows, groups)[::high, ::wide]
        if kept.has_zero:
            zero = _read(zeros, torch.uint8, rows, groups)[::high, ::wide] - kept.offset
    else:
        factors = _read(records[:, None, : STRIP * 4], torch.float32, rows, 1)
        scale = factors[::high].to(kept.scale_dtype)
    return QuantizedWeight(
        spec=spec,
        codes=codes - kept.offset if kept.offset else codes,
        scale=scale.contiguous(),
        zero_point=None if zero is None else zero.contiguous(),
        extra=dict(extra),
    )


def join(
    packed: Sequence[tuple[Tensor, tuple[int, ...]]], *, experts: bool
) -> tuple[Tensor, tuple[int, ...]]:
    """Return weights of one format as one blob with its meta.

    Args:
        packed: (blob, meta) of each.
        experts: as separate weights, for `experts_linear`; otherwise as one weight whose features
            are those of all, which must be multiples of 64.

    Raises:
        KernelError: the formats differ, or features do not fill their records.
    """
    first = packed[0][1]
    alike = [(m if experts else m[COLUMNS:]) for _, m in packed]
    if any(m != alike[0] for m in alike):
        msg = f"only weights of one format can be joined, not {sorted(set(alike))}"
        raise KernelError(msg)
    rows = [m[ROWS] for _, m in packed]
    if not experts and any(n % STRIP for n in rows[:-1]):
        msg = f"features {rows} cannot be joined: all but the last must be multiples of {STRIP}"
        raise KernelError(msg)
    header = lib.sizes(first).header
    blob = torch.cat([packed[0][0][:header], *(b[header:] for b, _ in packed)])
    numbers = list(first)
    if experts:
        numbers[COUNT] = len(packed)
    else:
        numbers[ROWS] = sum(rows)
    return blob, tuple(numbers)


def _expanded(values: Tensor, weight: QuantizedWeight, numbers: tuple[int, ...]) -> Tensor:
    """Return group parameters [R, G] for each feature and stored group: [O, groups]."""
    rows, columns = weight.shape
    high, wide = weight.spec.granularity.region(rows, columns)
    values = bytes_of(values).repeat_interleave(high, 0)
    return values.repeat_interleave(max(1, wide // numbers[GROUP]), 1)


def bytes_of(values: Tensor) -> Tensor:
    """Return floats of 8 bits as bytes, which torch can move about; others as they are."""
    return values.view(torch.uint8) if values.dtype.itemsize == 1 else values


def _leads(blob: Tensor, numbers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return views of a blob [strip, chunk, bytes]: scales and zero points of all chunks."""
    sizes = lib.sizes(numbers)
    strips = (blob.numel() - sizes.header) // sizes.record
    chunks = -(-numbers[COLUMNS] // numbers[GROUP] // sizes.groups)
    shape, first = (strips, chunks, sizes.lead), sizes.header + STRIP * 4
    leads = blob.as_strided(shape, (sizes.record, sizes.chunk, 1), first)
    zeros = sizes.groups * STRIP if numbers[_ZERO] else 0
    return leads[..., : sizes.lead - zeros], leads[..., sizes.lead - zeros :]


def _write(part: Tensor, values: Tensor) -> None:
    """Write values [O, G] into a part [strip, chunk, bytes], ordered by group, then by feature.

    What a strip or a chunk has beyond O and G is set to zero.
    """
    rows, groups = values.shape
    strips, chunks, size = part.shape
    each = size // (STRIP * values.itemsize)
    whole = values.new_zeros(strips * STRIP, chunks * each)
    whole[:rows, :groups] = values
    ordered = whole.view(strips, STRIP, chunks * each).transpose(1, 2).contiguous()
    part.copy_(ordered.view(torch.uint8).view(strips, chunks, size))


def _read(part: Tensor, dtype: torch.dtype, rows: int, groups: int) -> Tensor:
    """Return what `_write` wrote: [rows, groups]."""
    kept = torch.uint8 if dtype.itemsize == 1 else dtype
    strips = len(part)
    ordered = part.contiguous().view(kept).view(strips, -1, STRIP)
    values = ordered.transpose(1, 2).reshape(strips * STRIP, -1)[:rows, :groups]
    return values.contiguous().view(dtype)
