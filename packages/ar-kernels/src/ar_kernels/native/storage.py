"""How a weight is stored for the CPU kernels: which integers, table and scales it becomes.

The kernels know one kind of weight: `scale * (table[code] - zero point)`, with one scale for each
group of inputs and one factor for each feature. This module says what each representation is in
those terms, or why it is not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from ar_kernels.numerics.floats import FloatType
from ar_kernels.weight import KernelError
from ar_schemes import Span, TensorSpec

if TYPE_CHECKING:
    from ar_kernels.numerics.base import DataType

DEPTH = 32
"""Inputs that a block of codes covers."""
UNIT = 16
"""The finest group of inputs."""
TABLE = 128
"""Values in a header."""
INTEGER, E4M3, TABULAR = range(3)
"""Kinds: whole numbers, E4M3, and whatever a table of values holds."""
SCALES = {
    None: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float32: 3,
    torch.float8_e8m0fnu: 4,
    torch.float8_e4m3fn: 5,
    "ue5m3": 6,
}
"""Number of each type of group scales."""
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "e8m0": torch.float8_e8m0fnu,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "ue5m3": torch.uint8,
}
_NOT_A_TABLE = frozenset({"int_asym_float_zp", "int_sym_dq", "int_asym_dq"})


@runtime_checkable
class HasCodebook(Protocol):
    """A data type whose weights are `scale * value of the code`, and which says the values.

    Optional for data types of plugins; with it their weights run on the CPU kernels.
    """

    def codebook(self, spec: TensorSpec) -> Tensor:
        """Return the values of all codes, float32 [2 ** bits]."""


@dataclass(frozen=True)
class Storage:
    """A representation in the terms of the kernels.

    Attributes:
        bits: width of a stored code: 2, 3, 4, 5, 6 or 8.
        kind: `INTEGER`, `E4M3` or `TABULAR`.
        offset: what is added to a code before it is stored.
        zero_bias: what is added to every zero point.
        scale_dtype: type of the scale in a `QuantizedWeight`.
        scale: number of the type of group scales.
        has_zero: whether zero points are stored.
        extra: names of further parameters that a weight carries.
    """

    bits: int
    kind: int
    offset: int
    zero_bias: float
    scale_dtype: torch.dtype
    scale: int
    has_zero: bool
    extra: tuple[str, ...] = ()

    @property
    def centred(self) -> bool:
        """Tell whether sums of inputs are needed: there are zero points, or all are biased."""
        return self.has_zero or self.zero_bias != 0


def refuses(spec: TensorSpec) -> str | None:
    """Return why a representation cannot be stored, or None."""
    try:
        why = _numbers(spec).refuses(spec)
    except KernelError as error:
        return str(error)
    if why is not None:
        return why
    if spec.super_group is not None or spec.data_type in _NOT_A_TABLE:
        return f"{spec.data_type} is not one scale times a table of values"
    if spec.scale_dtype not in _DTYPES:
        return f"scales of type {spec.scale_dtype} are not read"
    numbers = _numbers(spec)
    if spec.data_type != "int" and not isinstance(numbers, (FloatType, HasCodebook)):
        return f"{spec.data_type} does not say the values of its codes (a method `codebook`)"
    if spec.data_type != "int" and spec.bits not in (2, 3, 4, 5, 6, 8):
        return f"codes of {spec.bits} bits are not read"
    inputs = spec.granularity.size[-1] if spec.granularity.size else UNIT
    return None if inputs % UNIT == 0 else f"groups of {inputs} inputs; multiples of 16 are read"


@functools.lru_cache(maxsize=512)
def storage(spec: TensorSpec) -> Storage:
    """Return how a representation that `refuses` does not refuse is stored."""
    scale_dtype = _DTYPES[spec.scale_dtype]
    scale = SCALES["ue5m3" if spec.scale_dtype == "ue5m3" else scale_dtype]
    if spec.data_type == "int":
        wide = spec.bits >= 7  # noqa: PLR2004 - 7 bits are stored as 8
        # codes of 8 bits are kept as code - 127.5, whose sign and magnitude share one table
        bias = (0.5 if spec.symmetric else -127.5) if wide else 0.0
        return Storage(
            bits=8 if wide else spec.bits,
            kind=INTEGER,
            offset=64 if spec.bits == 7 else 0,  # noqa: PLR2004
            zero_bias=bias,
            scale_dtype=scale_dtype,
            scale=scale,
            has_zero=not spec.symmetric,
        )
    floats = isinstance(_numbers(spec), FloatType)
    kind = E4M3 if floats and spec.bits == 8 else TABULAR  # noqa: PLR2004
    two_levels = spec.data_type.startswith("nv_fp")
    extra = ("global_scale",) if two_levels else ()
    return Storage(spec.bits, kind, 0, 0.0, scale_dtype, scale, has_zero=False, extra=extra)


@functools.lru_cache(maxsize=512)
def table(spec: TensorSpec) -> Tensor:
    """Return the values of stored codes, float32 [128]; tables of narrow codes are repeated.

    Codes of 8 bits are a sign and a magnitude: the values of the magnitudes.
    """
    stored = storage(spec)
    if stored.kind == INTEGER and stored.bits == 8:  # noqa: PLR2004
        return torch.arange(TABLE).float() + 0.5
    codes = torch.arange(min(2**stored.bits, TABLE), dtype=torch.uint8)
    numbers = _numbers(spec)
    if spec.data_type == "int":
        values = codes.float() - (2 ** (spec.bits - 1) if spec.symmetric else 0)
    elif isinstance(numbers, FloatType):
        values = numbers.element(spec).decode(codes)
    else:
        assert isinstance(numbers, HasCodebook)
        whole = numbers.codebook(spec).float().cpu()
        values = whole[: len(codes)]
        if len(whole) > TABLE and not torch.equal(whole[TABLE:], -values):
            msg = f"{spec.data_type}: codes of 8 bits must be a sign and a magnitude"
            raise KernelError(msg)
    return values.repeat(TABLE // len(values)).contiguous()


@functools.lru_cache(maxsize=512)
def exact_in_bf16(spec: TensorSpec) -> bool:
    """Tell whether bf16 holds every value of the table."""
    values = table(spec).nan_to_num()
    return bool(torch.equal(values.bfloat16().float(), values))


def group(spec: TensorSpec, columns: int) -> int:
    """Return the inputs that share a stored group scale; 0 where a factor of each feature will do.

    Groups that are no multiple of 32 are stored as groups of 16 with equal scales.
    """
    if spec.granularity.span in (Span.CHANNEL, Span.TENSOR):
        whole = -(-columns // DEPTH) * DEPTH
        return whole if storage(spec).centred else 0
    inputs = spec.granularity.size[-1]
    return inputs if inputs % DEPTH == 0 else UNIT


def _numbers(spec: TensorSpec) -> DataType:
    from ar_kernels.registry import data_type  # the registry holds the backends

    return data_type(spec.data_type)
