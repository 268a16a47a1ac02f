"""The GPTQ layouts: streams along the input axis, one per output column.

`qweight` int32 [I*b/32, O], `scales` fp16 [G, O], `qzeros` int32 [G, O*b/32] with the stream along
O, optionally `g_idx` int32 [I]. Version 1 stores zero points minus one, version 2 as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ar_kernels.layouts.base import TensorFact
from ar_kernels.layouts.bitstream import WORD, pack_stream, unpack_stream
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

_ALIGN = 32


@dataclass(frozen=True)
class GptqLayout:
    """A GPTQ layout.

    Attributes:
        name: `gptq` or `gptq_v2`.
        zero_shift: what is subtracted from zero points before storing (1 in version 1).
        with_g_idx: write the group of each input channel, as AutoGPTQ did.
    """

    name: str
    zero_shift: int
    with_g_idx: bool = False

    def refuses(self, spec: TensorSpec, rows: int, columns: int) -> str | None:
        """Return why a weight cannot be packed so, or None."""
        if spec.data_type != "int" or not 2 <= spec.bits <= 8:
            return f"{self.name} holds int of 2 to 8 bits, not {spec.data_type}{spec.bits}"
        if spec.granularity.span not in ("group", "channel"):
            return f"{self.name} holds one scale per group or channel, not per {spec.granularity}"
        if spec.scale_dtype != "float16":
            return f"{self.name} holds scales in float16, not {spec.scale_dtype}"
        if rows % _ALIGN or columns % _ALIGN:
            return f"shape [{rows}, {columns}] is not a multiple of {_ALIGN}"
        if columns % spec.granularity.region(rows, columns)[1]:
            return f"{spec.granularity} does not divide {columns} input features"
        return None

    def facts(self, spec: TensorSpec, rows: int, columns: int) -> dict[str, TensorFact]:
        """Return the packed tensors' shapes and types without data."""
        groups = spec.granularity.scale_shape(rows, columns)[1]
        out = {
            "qweight": TensorFact((columns * spec.bits // WORD, rows), torch.int32),
            "qzeros": TensorFact((groups, rows * spec.bits // WORD), torch.int32),
            "scales": TensorFact((groups, rows), torch.float16),
        }
        if self.with_g_idx:
            out["g_idx"] = TensorFact((columns,), torch.int32)
        return out

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return `qweight`, `qzeros`, `scales` (and `g_idx`).

        Raises:
            KernelError: the weight does not fit, or version 1 meets a zero point of 0 (stored
                it would be -1 and borrow from its neighbours).
        """
        rows, columns = weight.shape[-2:]
        why = self.refuses(weight.spec, rows, columns)
        if why is not None:
            raise KernelError(why)
        if not self.with_g_idx:
            require_natural_order(self.name, weight)
        bits = weight.spec.bits
        zero = weight.zero_point
        if zero is None:
            zero = torch.full_like(weight.scale, 2 ** (bits - 1), dtype=torch.uint8)
        if self.zero_shift and int(zero.min()) == 0:
            msg = (
                f"{self.name} stores zero points minus one and cannot hold a zero point of 0; "
                "use gptq_v2, awq or compressed-tensors for asymmetric weights"
            )
            raise KernelError(msg)
        out = {
            "qweight": pack_stream(natural_codes(weight), bits).t().contiguous(),
            "qzeros": pack_stream((zero - self.zero_shift).t().contiguous(), bits),
            "scales": weight.scale.to(torch.float16).t().contiguous(),
        }
        if self.with_g_idx:
            out["g_idx"] = index_of(weight)
        return out

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, rows: int, columns: int
    ) -> QuantizedWeight:
        """Return the weight.

        Raises:
            KernelError: the weight does not fit, a tensor is missing or has the wrong shape or
                type, `g_idx` makes groups of unequal size, or a symmetric checkpoint holds
                zero points that are not the middle.
        """
        self._check(tensors, spec, rows, columns)
        index = tensors.get("g_idx")
        order = None if index is None else order_of(index, spec, columns)
        codes = unpack_stream(tensors["qweight"].t().contiguous(), spec.bits, columns)
        codes = sorted_by(codes, order)
        extra = {} if order is None else {CHANNEL_ORDER: order}
        scale = tensors["scales"].t().contiguous()
        zero = unpack_stream(tensors["qzeros"], spec.bits, rows).t().contiguous()
        # the addition wraps within the width, as readers that mask after adding do
        zero = (zero + self.zero_shift) & (2**spec.bits - 1)
        if spec.symmetric:
            if not bool((zero == 2 ** (spec.bits - 1)).all()):
                msg = (
                    f"{self.name}: the checkpoint says symmetric but its zero points are not all "
                    f"{2 ** (spec.bits - 1)}; read it as asymmetric (sym=False)"
                )
                raise KernelError(msg)
            return QuantizedWeight(spec, codes, scale, extra=extra)
        return QuantizedWeight(spec, codes, scale, zero, extra)

    def _check(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, rows: int, columns: int
    ) -> None:
        """Raise unless the tensors are those of a weight [rows, columns] of this spec."""
        why = self.refuses(spec, rows, columns)
        if why is not None:
            raise KernelError(why)
        facts = self.facts(spec, rows, columns)
        for suffix in ("qweight", "qzeros", "scales"):
            fact, found = facts[suffix], tensors.get(suffix)
            if found is None or tuple(found.shape) != fact.shape or found.dtype != fact.dtype:
                have = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                msg = (
                    f"{self.name}: {suffix} of {spec} [{rows}, {columns}] must be {fact.dtype} "
                    f"{list(fact.shape)}, found {have}"
                )
                raise KernelError(msg)


GPTQ = GptqLayout("gptq", zero_shift=1)
GPTQ_V2 = GptqLayout("gptq_v2", zero_shift=0)
GPTQ_G_IDX = GptqLayout("gptq_g_idx", zero_shift=1, with_g_idx=True)
GPTQ_V2_G_IDX = GptqLayout("gptq_v2_g_idx", zero_shift=0, with_g_idx=True)
