"""Activations, fake-quantized as an engine quantizes them at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.numerics.base import Params
from ar_kernels.numerics.elements import E4M3
from ar_kernels.numerics.fp8 import SMALLEST
from ar_kernels.numerics.nvfp4 import NvFp4, global_scale
from ar_kernels.registry import data_type, data_types
from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from torch import Tensor

    from ar_schemes import TensorSpec


def fake_quant_activation(
    x: Tensor, spec: TensorSpec, *, static: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """Return activations [..., I] quantized and dequantized, float32.

    The gradient passes straight through where nothing was clamped.

    Args:
        x: activations.
        spec: how they are represented: a scale per token, group or tensor.
        static: float32 [1]: the step (or, for NVFP4, the tensor scale) collected beforehand, as
            `static_scale` gives it; None: found here, from these activations.
        zero: float32 [1], integer-valued: the zero point that goes with `static` of asymmetric
            integers.

    Raises:
        KernelError: a range is given to a data type that has none.
    """
    kind = data_type(spec.data_type)
    if not x.numel():
        return x.float()
    rows = x.reshape(-1, x.shape[-1]).float()
    if static is None:
        params = kind.parameters(rows.detach(), spec)
    elif isinstance(kind, NvFp4):
        whole = static.reshape(1, 1).to(rows)
        params = kind.parameters(rows.detach(), spec, shared={"global_scale": whole})
    elif spec.data_type in ("fp", "int"):
        shape = spec.granularity.scale_shape(*rows.shape)
        point = None if zero is None else zero.to(rows).reshape(1, 1).expand(shape)
        params = Params(static.to(rows).reshape(1, 1).expand(shape), point)
    else:
        msg = f"activations of {spec.data_type} have no range that is collected beforehand"
        raise KernelError(msg)
    return kind.fake_quant(rows, spec, params).reshape(x.shape)


def refuses_activation(spec: TensorSpec, columns: int | None = None) -> str | None:
    """Return why activations (of `columns` features) cannot be quantized so, or None."""
    if spec.data_type not in data_types():
        return f"data type {spec.data_type!r} of the activations is not known here"
    why = data_type(spec.data_type).refuses(spec)
    if why is not None:
        return f"activations: {why}"
    if columns is not None and columns % spec.granularity.region(1, columns)[1]:
        return f"activations in {spec.granularity} do not divide {columns} input features"
    return None


def static_scale(largest: Tensor, spec: TensorSpec) -> Tensor:
    """Return the value a checkpoint stores for the largest magnitude of activations, float32.

    Raises:
        KernelError: the data type has no range that is collected beforehand.
    """
    largest = largest.float()
    if isinstance(data_type(spec.data_type), NvFp4):
        return global_scale(largest)
    if spec.data_type == "fp":
        return (largest / E4M3.maximum).clamp_min(SMALLEST)
    if spec.data_type == "int":
        return (largest / (2 ** (spec.bits - 1) - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    msg = f"activations of {spec.data_type} have no range that is collected beforehand"
    raise KernelError(msg)
