"""`QuantizedWeight`: codes and parameters of one layer, exact, unpacked, without a file format."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ar_schemes import ArError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_schemes import TensorSpec


CHANNEL_ORDER = "channel_order"
"""Name in `QuantizedWeight.extra`: int32 [I], the channel of each column of codes, where groups
are not made of neighbours."""


class KernelError(ArError):
    """Quantized numbers that cannot be: wrong shapes, values, layouts or no backend for them."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized weight. The interchange of the whole project.

    Attributes:
        spec: how it is represented.
        codes: uint8 [..., O, I], one stored code per weight. For `int` it is the unsigned code
            0 .. 2**bits - 1; for float elements the bit pattern.
        scale: [..., R, G] as `spec.granularity` says; the values that a file will hold, so in
            the file's precision (fp16 for int).
        zero_point: uint8, shape of `scale`; None when symmetric (then 2**(bits-1) for `int`).
        extra: further parameters of data types with more levels (`global_scale`, `super_scale`).
    """

    spec: TensorSpec
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.codes.ndim < 2 or self.codes.dtype != torch.uint8:
            msg = (
                f"codes must be uint8 with at least two dimensions, not {self.codes.dtype} "
                f"{list(self.codes.shape)}"
            )
            raise KernelError(msg)
        expected = (*self.shape[:-2], *self.spec.granularity.scale_shape(*self.shape[-2:]))
        if tuple(self.scale.shape) != expected:
            msg = (
                f"scale of shape {list(self.scale.shape)} does not fit codes "
                f"{list(self.codes.shape)} with granularity {self.spec.granularity}: "
                f"it must be {list(expected)}"
            )
            raise KernelError(msg)
        zero = self.zero_point
        if zero is not None and (zero.shape != self.scale.shape or zero.dtype != torch.uint8):
            msg = (
                f"zero point is {zero.dtype} {list(zero.shape)} but must be uint8 and have the "
                f"shape of the scale, {list(self.scale.shape)}"
            )
            raise KernelError(msg)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, [..., O, I]."""
        return tuple(self.codes.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, for storing."""
        out = {"codes": self.codes, "scale": self.scale}
        if self.zero_point is not None:
            out["zero_point"] = self.zero_point
        return out | {f"extra.{k}": v for k, v in self.extra.items()}

    @classmethod
    def from_tensors(cls, spec: TensorSpec, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return the weight whose `tensors()` these are.

        Raises:
            KernelError: codes or scale are missing, or shapes do not fit together.
        """
        absent = {"codes", "scale"} - tensors.keys()
        if absent:
            msg = f"a quantized weight needs {sorted(absent)}, found only {sorted(tensors)}"
            raise KernelError(msg)
        return cls(
            spec=spec,
            codes=tensors["codes"],
            scale=tensors["scale"],
            zero_point=tensors.get("zero_point"),
            extra={
                k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")
            },
        )

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return it on another device."""
        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero_point=None if self.zero_point is None else self.zero_point.to(device),
            extra={k: v.to(device) for k, v in self.extra.items()},
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [..., O, I] that the codes stand for, computed in float32.

        Its columns are in the order of the input, also where the codes' are not.
        """
        from ar_kernels.registry import data_type  # the registry holds data types that use us

        values = data_type(self.spec.data_type).dequantize(self).to(dtype)
        order = self.extra.get(CHANNEL_ORDER)
        if order is None:
            return values
        out = torch.empty_like(values)
        out[..., order.long()] = values
        return out


def equal(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Tell whether two weights are the same to the bit (spec, codes and every parameter)."""
    mine, theirs = a.tensors(), b.tensors()
    return (
        a.spec == b.spec
        and mine.keys() == theirs.keys()
        and all(mine[k].dtype == theirs[k].dtype for k in mine)
        and all(torch.equal(bits(mine[k]), bits(theirs[k])) for k in mine)
    )


def bits(tensor: Tensor) -> Tensor:
    """Return 8-bit floats as bytes, which torch can compare."""
    narrow = tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1
    return tensor.contiguous().view(torch.uint8) if narrow else tensor
