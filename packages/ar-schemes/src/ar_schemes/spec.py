"""How one tensor is represented: `Granularity`, `SuperGroup`, `TensorSpec`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ar_schemes.errors import SchemeError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Span(StrEnum):
    """The kind of region that shares one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    TILE = "tile"
    TOKEN = "token"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class Granularity:
    """The region of a tensor that shares one scale.

    For a weight [O, I] the scale has shape: tensor [1, 1], channel [O, 1], group of n
    [O, I / n], tile (m, n) [O / m, I / n]. For an activation [T, I]: token [T, 1], group
    [T, I / n].
    """

    span: Span
    size: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        expected = {Span.GROUP: 1, Span.TILE: 2}.get(self.span, 0)
        if len(self.size) != expected or any(not _is_count(n) for n in self.size):
            msg = (
                f"granularity {self.span}: size {self.size} is wrong; "
                f"{expected} positive number(s) are needed"
            )
            raise SchemeError(msg)

    @classmethod
    def from_group_size(cls, value: int | list[int] | tuple[int, ...]) -> Granularity:
        """Return the granularity that a file's `group_size` stands for (-1 channel, 0 tensor)."""
        if isinstance(value, (list, tuple)):
            return cls(Span.TILE, tuple(value))
        if isinstance(value, bool) or not isinstance(value, int) or value < -1:
            msg = (
                f"group size {value!r} is not allowed: use a positive number, -1 (one scale per "
                "output channel), 0 (one per tensor) or a pair (rows, columns)"
            )
            raise SchemeError(msg)
        if value == -1:
            return cls(Span.CHANNEL)
        return cls(Span.TENSOR) if value == 0 else cls(Span.GROUP, (value,))

    @property
    def group_size(self) -> int | tuple[int, int]:
        """The `group_size` of file formats: -1 for channel and token, 0 for tensor."""
        if self.span is Span.TILE:
            return (self.size[0], self.size[1])
        if self.span is Span.GROUP:
            return self.size[0]
        return 0 if self.span is Span.TENSOR else -1

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the scale of a [rows, columns] tensor.

        Raises:
            SchemeError: the region does not divide the tensor.
        """
        step_r, step_c = self.region(rows, columns)
        if rows % step_r or columns % step_c:
            msg = f"granularity {self} does not divide a tensor of shape [{rows}, {columns}]"
            raise SchemeError(msg)
        return rows // step_r, columns // step_c

    def region(self, rows: int, columns: int) -> tuple[int, int]:
        """Return (rows, columns) of the region that shares one scale."""
        if self.span is Span.TENSOR:
            return rows, columns
        if self.span is Span.TILE:
            return self.size[0], self.size[1]
        return 1, self.size[0] if self.span is Span.GROUP else columns

    def __str__(self) -> str:
        return f"{self.span}{'x'.join(str(n) for n in self.size)}"


@dataclass(frozen=True)
class SuperGroup:
    """Second level of quantization (GGUF K types): `size` groups share one float scale.

    `bits` is the width of the inner group scales (and mins).
    """

    size: int
    bits: int


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is represented.

    `data_type` names the arithmetic (`int`, `mx_fp`, `nv_fp`, `fp`, ...), which ar-kernels or a
    plugin provides. `dynamic` matters for activations only: parameters found at run time (True)
    or collected during calibration (False).
    """

    data_type: str = "int"
    bits: int = 4
    granularity: Granularity = Granularity(Span.GROUP, (128,))
    symmetric: bool = True
    dynamic: bool = True
    scale_dtype: str = "float16"
    super_group: SuperGroup | None = None

    def __post_init__(self) -> None:
        if (
            not isinstance(self.bits, int)
            or isinstance(self.bits, bool)
            or not 1 <= self.bits <= 16
        ):
            msg = f"bits {self.bits!r} is not allowed: use a whole number from 1 to 16"
            raise SchemeError(msg)

    def with_(self, **changes: Any) -> TensorSpec:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain values, for storing."""
        return {**asdict(self), "granularity": [str(self.granularity.span), *self.granularity.size]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TensorSpec:
        """Return the spec whose `to_dict()` this is."""
        span, *size = plain["granularity"]
        inner = plain["super_group"]
        return cls(
            **{
                **plain,
                "granularity": Granularity(Span(span), tuple(size)),
                "super_group": None if inner is None else SuperGroup(**inner),
            }
        )

    @property
    def group_size(self) -> int | tuple[int, int]:
        """The `group_size` of file formats."""
        return self.granularity.group_size

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Return stored bits per element of a [rows, columns] weight, scales and zeros included."""
        if self.bits >= 16:
            return 16.0
        groups_r, groups_c = self.granularity.scale_shape(rows, columns)
        per_group: float = _SCALE_BITS.get(self.scale_dtype, 16)
        if self.super_group is not None:
            values = 1 if self.symmetric else 2
            per_group = values * (self.super_group.bits + 16 / self.super_group.size)
        elif not self.symmetric:
            per_group += 16 if self.data_type == "int_asym_float_zp" else self.bits
        return self.bits + per_group * groups_r * groups_c / (rows * columns)

    def __str__(self) -> str:
        sym = "" if self.symmetric else " asym"
        return f"{self.data_type}{self.bits} {self.granularity}{sym}"


_SCALE_BITS = {
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "float8_e4m3fn": 8,
    "ue5m3": 8,
    "e8m0": 8,
}
