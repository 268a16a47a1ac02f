"""The integer layouts of compressed-tensors.

`ct_pack`: `weight_packed` int32 [O, I*b/32], one dense stream per row of code + 2**(b-1) of the
signed code, which is our unsigned code; `weight_scale` [O, G]; `weight_shape` int64 [2]; for
asymmetric weights `weight_zero_point` int32 with the stream along O.
`ct_int`: `weight` int8 [O, I] of signed codes and `weight_scale`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.layouts.base import TensorFact
from ar_kernels.layouts.bitstream import WORD, pack_stream, unpack_stream
from ar_kernels.layouts.checks import require, require_holds
from ar_kernels.layouts.ordering import (
    index_of,
    natural_codes,
    order_of,
    require_natural_order,
    sorted_by,
)
from ar_kernels.weight import CHANNEL_ORDER, KernelError, QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_schemes import TensorSpec


_STATIC = {
    "input_scale": TensorFact((1,), torch.float32),
    "input_zero_point": TensorFact((1,), torch.int8),
}
"""Tensors of static activations, there or not; the zero point is that of signed codes."""
_INDEX = "weight_g_idx"
"""Group of each channel (`actorder: group`), there or not."""


def _ranges(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the ranges of static activations as a weight carries them, float32 [1]."""
    return {k: tensors[k].float().reshape(1) for k in _STATIC if k in tensors}


def _stored(extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the ranges that a weight carries as files hold them."""
    return {k: v.to(_STATIC[k].dtype) for k, v in _ranges(extra).items()}


def _words(count: int, bits: int) -> int:
    return -(-count * bits // WORD)


def _refusal(name: str, spec: TensorSpec, rows: int, columns: int) -> str | None:
    if spec.data_type != "int" or not 2 <= spec.bits <= 8:
        return f"{name} holds int of 2 to 8 bits, not {spec.data_type}{spec.bits}"
    if spec.granularity.span not in ("group", "channel"):
        return f"{name} holds one scale per group or channel, not per {spec.granularity}"
    if columns % spec.granularity.region(rows, columns)[1]:
        return f"{spec.granularity} does not divide {columns} input features"
    return None


class CompressedPack:
    """Layout `ct_pack`: format pack-quantized."""

    name = "ct_pack"
    optional = {**_STATIC, _INDEX: TensorFact((-1,), torch.int32)}

    def refuses(self, spec: TensorSpec, rows: int, columns: int) -> str | None:
        """Return why a weight cannot be packed so, or None."""
        return _refusal(self.name, spec, rows, columns)

    def facts(self, spec: TensorSpec, rows: int, columns: int) -> dict[str, TensorFact]:
        """Return the packed tensors' shapes and types without data."""
        groups = spec.granularity.scale_shape(rows, columns)[1]
        out = {
            "weight_packed": TensorFact((rows, _words(columns, spec.bits)), torch.int32),
            "weight_scale": TensorFact((rows, groups), getattr(torch, spec.scale_dtype)),
            "weight_shape": TensorFact((2,), torch.int64),
        }
        if not spec.symmetric:
            shape = (_words(rows, spec.bits), groups)
            out["weight_zero_point"] = TensorFact(shape, torch.int32)
        return out

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the packed tensors.

        Raises:
            KernelError: the weight does not fit.
        """
        rows, columns = weight.shape[-2:]
        require_holds(self, weight.spec, rows, columns)
        out = {
            "weight_packed": pack_stream(natural_codes(weight), weight.spec.bits),
            "weight_scale": weight.scale.contiguous(),
            "weight_shape": torch.tensor([rows, columns], device=weight.codes.device),
        }
        if weight.zero_point is not None:
            zeros = pack_stream(weight.zero_point.t().contiguous(), weight.spec.bits)
            out["weight_zero_point"] = zeros.t().contiguous()
        if CHANNEL_ORDER in weight.extra:
            out[_INDEX] = index_of(weight)
        return out | _stored(weight.extra)

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, rows: int, columns: int
    ) -> QuantizedWeight:
        """Return the weight.

        Raises:
            KernelError: tensors are missing or do not fit.
        """
        require(self, tensors, spec, rows, columns)
        if tensors["weight_shape"].tolist() != [rows, columns]:
            msg = (
                f"ct_pack: weight_shape says {tensors['weight_shape'].tolist()}, "
                f"not {[rows, columns]}"
            )
            raise KernelError(msg)
        codes = unpack_stream(tensors["weight_packed"].contiguous(), spec.bits, columns)
        index = tensors.get(_INDEX)
        # absent, or filled with -1 where the writer kept the order
        order = None if index is None or bool((index < 0).all()) else order_of(index, spec, columns)
        codes = sorted_by(codes, order)
        extra = _ranges(tensors) | ({} if order is None else {CHANNEL_ORDER: order})
        scale = tensors["weight_scale"].contiguous()
        if spec.symmetric:
            return QuantizedWeight(spec, codes, scale, extra=extra)
        stream = tensors["weight_zero_point"].t().contiguous()
        zero = unpack_stream(stream, spec.bits, rows).t().contiguous()
        return QuantizedWeight(spec, codes, scale, zero, extra)


class CompressedInt:
    """Layout `ct_int`: format int-quantized."""

    name = "ct_int"
    optional = _STATIC

    def refuses(self, spec: TensorSpec, rows: int, columns: int) -> str | None:
        """Return why a weight cannot be packed so, or None."""
        return _refusal(self.name, spec, rows, columns)

    def facts(self, spec: TensorSpec, rows: int, columns: int) -> dict[str, TensorFact]:
        """Return the packed tensors' shapes and types without data."""
        scale = spec.granularity.scale_shape(rows, columns)
        out = {
            "weight": TensorFact((rows, columns), torch.int8),
            "weight_scale": TensorFact(scale, getattr(torch, spec.scale_dtype)),
        }
        if not spec.symmetric:
            out["weight_zero_point"] = TensorFact(scale, torch.int8)
        return out

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the packed tensors.

        Raises:
            KernelError: the weight does not fit.
        """
        require_holds(self, weight.spec, *weight.shape[-2:])
        require_natural_order(self.name, weight)
        middle = 2 ** (weight.spec.bits - 1)
        out = {
            "weight": (weight.codes.short() - middle).to(torch.int8),
            "weight_scale": weight.scale.contiguous(),
        }
        if weight.zero_point is not None:
            out["weight_zero_point"] = (weight.zero_point.short() - middle).to(torch.int8)
        return out | _stored(weight.extra)

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, rows: int, columns: int
    ) -> QuantizedWeight:
        """Return the weight.

        Raises:
            KernelError: tensors are missing or do not fit.
        """
        require(self, tensors, spec, rows, columns)
        codes = _unsigned(tensors["weight"], spec.bits)
        zero = None if spec.symmetric else _unsigned(tensors["weight_zero_point"], spec.bits)
        scale = tensors["weight_scale"].contiguous()
        return QuantizedWeight(spec, codes, scale, zero, _ranges(tensors))


def _unsigned(signed: Tensor, bits: int) -> Tensor:
    value = signed.short() + 2 ** (bits - 1)
    if value.numel() and (int(value.min()) < 0 or int(value.max()) >= 2**bits):
        msg = f"ct_int: values from {int(signed.min())} to {int(signed.max())} exceed {bits} bits"
        raise KernelError(msg)
    return value.to(torch.uint8).contiguous()
