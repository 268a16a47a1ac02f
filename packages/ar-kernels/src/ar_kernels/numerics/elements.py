"""Small floating-point elements: rounding to nearest, codes and values.

Names give sign, exponent and mantissa bits: E2M1 (OCP Microscaling 1.0, section 5.3) holds
0, 0.5, 1, 1.5, 2, 3, 4, 6. Everything saturates; nothing is infinite.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_EXPONENT_BITS = 0x7F800000
_MANTISSA = 23
"""Of float32."""


class Element(Protocol):
    """What a number type says of one element."""

    @property
    def maximum(self) -> float:
        """The largest magnitude."""

    @property
    def top_exponent(self) -> int:
        """The exponent of two of the largest magnitude."""

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest values (ties to even codes), saturating; float32."""

    def encode(self, values: Tensor) -> Tensor:
        """Return the uint8 codes of values that `round` returned."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of codes."""


@dataclass(frozen=True)
class FloatElement:
    """A float of `exponent` and `mantissa` bits, code = sign, exponent, mantissa.

    Attributes:
        bias: of the exponent.
        maximum: largest finite value; what lies above it in the code range is not used.
        signed: has a sign bit in front.
    """

    exponent: int
    mantissa: int
    bias: int
    maximum: float
    signed: bool = True

    @property
    def top_exponent(self) -> int:
        """The exponent of two of the largest magnitude."""
        return math.frexp(self.maximum)[1] - 1

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest values (ties to even codes), saturating; float32."""
        x = x.float().clamp(-self.maximum if self.signed else 0.0, self.maximum)
        if self is E4M3:  # torch rounds half to even, too, in one pass
            return x.to(torch.float8_e4m3fn).float()
        # the power of two below each value, at least that of the subnormals, read off its bits
        power = (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
        power.clamp_min_(2.0 ** (1 - self.bias))
        # added and taken away again, this leaves multiples of the spacing of the binade: what is
        # added ends where float32 ends, and float32 rounds half to even
        large = power.mul_(1.5 * 2.0 ** (_MANTISSA - self.mantissa))
        return (x + large).sub_(large).copysign_(x)

    def encode(self, values: Tensor) -> Tensor:
        """Return the uint8 codes of values that `round` returned."""
        if self is E4M3:
            return values.to(torch.float8_e4m3fn).view(torch.uint8)
        table = self._positive().to(values.device)
        codes = torch.bucketize(values.abs(), table).to(torch.uint8)
        if not self.signed:
            return codes
        return codes | (torch.signbit(values).to(torch.uint8) << (self.exponent + self.mantissa))

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of codes."""
        if self is E4M3:
            return codes.view(torch.float8_e4m3fn).float()
        table = self._values().to(codes.device)
        return table[codes.int()]

    @functools.cache  # noqa: B019 - one small table for each of a few constants
    def _positive(self) -> Tensor:
        code = torch.arange(2 ** (self.exponent + self.mantissa))
        power, fraction = code >> self.mantissa, (code % 2**self.mantissa).float()
        last = power.clamp_min(1) - self.bias - self.mantissa
        unit = torch.ldexp(torch.ones(last.shape), last)  # of the last place
        values = (fraction + torch.where(power > 0, 2.0**self.mantissa, 0.0)) * unit
        return values[values <= self.maximum]

    @functools.cache  # noqa: B019
    def _values(self) -> Tensor:
        half = 2 ** (self.exponent + self.mantissa)
        positive = torch.full((half,), float("nan"))
        positive[: len(self._positive())] = self._positive()
        return torch.cat([positive, -positive]) if self.signed else positive


@dataclass(frozen=True)
class StepElement:
    """Whole multiples of `step` up to `peak` either way; the code is the multiple + `peak` + 1."""

    peak: int
    step: float

    @property
    def maximum(self) -> float:
        """The largest magnitude."""
        return self.peak * self.step

    @property
    def top_exponent(self) -> int:
        """The exponent of two of the largest magnitude."""
        return math.frexp(self.maximum)[1] - 1

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest values, saturating; float32."""
        return (x.float() / self.step).round_().clamp_(-self.peak, self.peak).mul_(self.step)

    def encode(self, values: Tensor) -> Tensor:
        """Return the uint8 codes of values that `round` returned."""
        return (values / self.step + (self.peak + 1)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of codes."""
        return (codes.float() - (self.peak + 1)).mul_(self.step)


E2M1 = FloatElement(2, 1, bias=1, maximum=6.0)
E2M3 = FloatElement(2, 3, bias=1, maximum=7.5)
E3M2 = FloatElement(3, 2, bias=3, maximum=28.0)
E4M3 = FloatElement(4, 3, bias=7, maximum=448.0)
UE5M3 = FloatElement(5, 3, bias=15, maximum=114688.0, signed=False)
INT4 = StepElement(7, 0.25)
