"""Rounding with straight-through gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ar_kernels.numerics.elements import Element
    from ar_schemes import TensorSpec

SMALLEST_SCALE = 1e-5
"""Magnitude below which fp16 scales lose their digits; keeps a zero group finite."""


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # noqa: ARG004 - autograd's signature
        return x.round()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # noqa: ARG004 - autograd's signature
        return grad


def round_ste(x: Tensor) -> Tensor:
    """Return `x` rounded half to even; the gradient passes as if nothing had happened."""
    return _Round.apply(x)


def floored(scale: Tensor) -> Tensor:
    """Return the scale with its magnitude at least `SMALLEST_SCALE`, sign kept."""
    floor = torch.where(scale < 0, -SMALLEST_SCALE, SMALLEST_SCALE)
    return torch.where(scale.abs() < SMALLEST_SCALE, floor.to(scale.dtype), scale)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG004
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


class _ToElement(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, element: Element) -> Tensor:  # noqa: ARG004
        return element.round(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


def round_to(x: Tensor, element: Element) -> Tensor:
    """Return `x` rounded to values of an element; the gradient passes through."""
    return _ToElement.apply(x, element)


def stored(scale: Tensor, spec: TensorSpec) -> Tensor:
    """Return a scale rounded to the precision a file stores it in; the gradient passes through."""
    return _Cast.apply(scale, getattr(torch, spec.scale_dtype))


def to_float16(x: Tensor) -> Tensor:
    """Return `x` rounded to float16; the gradient passes through."""
    return _Cast.apply(x, torch.float16)
