"""The layout of MLX: weight = scale * code + bias, codes as a dense stream along the input axis.

`weight` uint32 [O, I*b/32], `scales` and `biases` [O, G] in the model's float type. Symmetric
integers have bias -scale * 2**(b-1), which is exact: the factor is a power of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.layouts.base import TensorFact
from ar_kernels.layouts.bitstream import WORD, pack_stream, unpack_stream
from ar_kernels.layouts.checks import require, require_holds
from ar_kernels.layouts.ordering import require_natural_order
from ar_kernels.weight import KernelError, QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_schemes import TensorSpec

_BITS = (2, 3, 4, 5, 6, 8)
_SIZES = (32, 64, 128)
_SHIFTED = "int_asym_float_zp"


class MlxLayout:
    """Layout `mlx`."""

    name = "mlx"

    def refuses(self, spec: TensorSpec, rows: int, columns: int) -> str | None:
        """Return why a weight cannot be packed so, or None."""
        if spec.data_type not in ("int", _SHIFTED) or spec.super_group is not None:
            return f"mlx holds integers, not {spec.data_type}"
        if spec.data_type == "int" and not spec.symmetric:
            return "mlx holds a float bias per group, not an integer zero point"
        if spec.bits not in _BITS:
            return f"mlx holds {', '.join(map(str, _BITS))} bits, not {spec.bits}"
        if spec.granularity.span != "group" or spec.granularity.size[0] not in _SIZES:
            return f"mlx has groups of {', '.join(map(str, _SIZES))}, not {spec.granularity}"
        if spec.scale_dtype not in ("float16", "bfloat16", "float32"):
            return f"mlx has float scales, not {spec.scale_dtype}"
        if columns % spec.granularity.size[0]:
            return f"{spec.granularity} does not divide {columns} input features"
        if not rows:
            return "a weight without rows"
        return None

    def facts(self, spec: TensorSpec, rows: int, columns: int) -> dict[str, TensorFact]:
        """Return the packed tensors' shapes and types without data."""
        shape = spec.granularity.scale_shape(rows, columns)
        dtype = getattr(torch, spec.scale_dtype)
        return {
            "weight": TensorFact((rows, columns * spec.bits // WORD), torch.uint32),
            "scales": TensorFact(shape, dtype),
            "biases": TensorFact(shape, dtype),
        }

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return `weight`, `scales` and `biases`.

        Raises:
            KernelError: the weight does not fit, or a bias is too large for its type.
        """
        require_holds(self, weight.spec, *weight.shape[-2:])
        require_natural_order(self.name, weight)
        bias = weight.extra["minimum"] if weight.spec.data_type == _SHIFTED else _middle(weight)
        return {
            "weight": pack_stream(weight.codes, weight.spec.bits).view(torch.uint32),
            "scales": weight.scale.contiguous(),
            "biases": bias.contiguous(),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, rows: int, columns: int
    ) -> QuantizedWeight:
        """Return the weight.

        Raises:
            KernelError: tensors are missing or do not fit, or biases contradict symmetry.
        """
        require(self, tensors, spec, rows, columns)
        words = tensors["weight"].contiguous().view(torch.int32)
        codes = unpack_stream(words, spec.bits, columns)
        scale, bias = tensors["scales"].contiguous(), tensors["biases"].contiguous()
        if spec.data_type == _SHIFTED:
            return QuantizedWeight(spec, codes, scale, extra={"minimum": bias})
        made = QuantizedWeight(spec, codes, scale)
        if not torch.equal(_middle(made), bias):
            msg = (
                "mlx: the checkpoint says symmetric but its biases are not all "
                f"-{2 ** (spec.bits - 1)} times the scale; read it as asymmetric"
            )
            raise KernelError(msg)
        return made


def _middle(weight: QuantizedWeight) -> Tensor:
    """Return the bias of a symmetric weight."""
    bias = weight.scale * -(2 ** (weight.spec.bits - 1))
    if not bool(torch.isfinite(bias).all()):
        msg = f"mlx: scales up to {float(weight.scale.abs().max())} overflow {bias.dtype} as biases"
        raise KernelError(msg)
    return bias
