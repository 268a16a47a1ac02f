"""The AWQ layout (GEMM kernels): 4 bits, words along the output axis, columns interleaved.

`qweight` int32 [I, O/8], `qzeros` int32 [G, O/8], `scales` fp16 [G, O]. Of the eight output
columns in a word the even ones fill the low half and the odd ones the high half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.layouts.base import TensorFact
from ar_kernels.layouts.bitstream import pack_stream, unpack_stream
from ar_kernels.layouts.checks import require, require_holds
from ar_kernels.layouts.ordering import require_natural_order
from ar_kernels.weight import KernelError, QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_schemes import TensorSpec

_BITS = 4
_PER_WORD = 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each nibble, lowest first."""
_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble of each column."""
_ALIGN = 32


class AwqLayout:
    """Layout `awq`."""

    name = "awq"

    def refuses(self, spec: TensorSpec, rows: int, columns: int) -> str | None:
        """Return why a weight cannot be packed so, or None."""
        if spec.data_type != "int" or spec.bits != _BITS:
            return f"awq holds int of 4 bits, not {spec.data_type}{spec.bits}"
        if spec.granularity.span not in ("group", "channel"):
            return f"awq holds one scale per group or channel, not per {spec.granularity}"
        if spec.scale_dtype != "float16":
            return f"awq holds scales in float16, not {spec.scale_dtype}"
        if rows % _ALIGN or columns % _ALIGN:
            return f"shape [{rows}, {columns}] is not a multiple of {_ALIGN}"
        if columns % spec.granularity.region(rows, columns)[1]:
            return f"{spec.granularity} does not divide {columns} input features"
        return None

    def facts(self, spec: TensorSpec, rows: int, columns: int) -> dict[str, TensorFact]:
        """Return the packed tensors' shapes and types without data."""
        groups = spec.granularity.scale_shape(rows, columns)[1]
        return {
            "qweight": TensorFact((columns, rows // _PER_WORD), torch.int32),
            "qzeros": TensorFact((groups, rows // _PER_WORD), torch.int32),
            "scales": TensorFact((groups, rows), torch.float16),
        }

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return `qweight`, `qzeros` (also of symmetric weights) and `scales`.

        Raises:
            KernelError: the weight does not fit.
        """
        require_holds(self, weight.spec, *weight.shape[-2:])
        require_natural_order(self.name, weight)
        zero = weight.zero_point
        if zero is None:
            zero = torch.full_like(weight.scale, 2 ** (_BITS - 1), dtype=torch.uint8)
        return {
            "qweight": _pack(weight.codes.t()),
            "qzeros": _pack(zero.t()),
            "scales": weight.scale.to(torch.float16).t().contiguous(),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, rows: int, columns: int
    ) -> QuantizedWeight:
        """Return the weight.

        Raises:
            KernelError: tensors are missing or do not fit, or a symmetric checkpoint holds zero
                points that are not the middle.
        """
        require(self, tensors, spec, rows, columns)
        codes = _unpack(tensors["qweight"], rows).t().contiguous()
        zero = _unpack(tensors["qzeros"], rows).t().contiguous()
        scale = tensors["scales"].t().contiguous()
        if not spec.symmetric:
            return QuantizedWeight(spec, codes, scale, zero)
        if not bool((zero == 2 ** (_BITS - 1)).all()):
            msg = (
                "awq: the checkpoint says symmetric but its zero points are not all 8; "
                "read it as asymmetric (zero_point true)"
            )
            raise KernelError(msg)
        return QuantizedWeight(spec, codes, scale)


def _pack(values: Tensor) -> Tensor:
    words = values.reshape(values.shape[0], -1, _PER_WORD)[..., list(_ORDER)]
    return pack_stream(words.reshape(values.shape), _BITS)


def _unpack(words: Tensor, count: int) -> Tensor:
    flat = unpack_stream(words, _BITS, count)
    return flat.reshape(flat.shape[0], -1, _PER_WORD)[..., list(_PLACE)].reshape(flat.shape)
