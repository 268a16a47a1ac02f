"""Layout `nf4`: two codes to a byte, the even column in the low half.

`codes` uint8 [O, I/2], `absmax` float16 [O, G]. Plain row order: a kernel can read it as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels import KernelError, QuantizedWeight
from ar_kernels.layouts import TensorFact

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_schemes import TensorSpec


class Nf4Layout:
    """The bit order."""

    name = "nf4"

    def refuses(self, spec: TensorSpec, rows: int, columns: int) -> str | None:
        """Return why a weight cannot be packed so, or None."""
        if spec.data_type != "nf4" or spec.bits != 4 or spec.scale_dtype != "float16":  # noqa: PLR2004
            return f"nf4 holds the data type nf4 with float16 scales, not {spec}"
        region_rows, region_columns = spec.granularity.region(rows, columns)
        if rows % region_rows or columns % region_columns:
            return f"{spec.granularity} does not divide [{rows}, {columns}]"
        return f"{columns} input features are odd" if columns % 2 else None

    def facts(self, spec: TensorSpec, rows: int, columns: int) -> dict[str, TensorFact]:
        """Return the packed tensors' shapes and types without data."""
        return {
            "codes": TensorFact((rows, columns // 2), torch.uint8),
            "absmax": TensorFact(spec.granularity.scale_shape(rows, columns), torch.float16),
        }

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return `codes` and `absmax`.

        Raises:
            KernelError: the weight is of another kind.
        """
        why = self.refuses(weight.spec, *weight.shape[-2:])
        if why is not None:
            raise KernelError(why)
        codes = weight.codes[:, 0::2] | (weight.codes[:, 1::2] << 4)
        return {"codes": codes.contiguous(), "absmax": weight.scale.contiguous()}

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, rows: int, columns: int
    ) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`.

        Raises:
            KernelError: the weight is of another kind, or a tensor is missing or ill-shaped.
        """
        why = self.refuses(spec, rows, columns)
        if why is not None:
            raise KernelError(why)
        for suffix, fact in self.facts(spec, rows, columns).items():
            found = tensors.get(suffix)
            if found is None or tuple(found.shape) != fact.shape or found.dtype != fact.dtype:
                have = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                msg = f"nf4: {suffix} must be {fact.dtype} {list(fact.shape)}, found {have}"
                raise KernelError(msg)
        return QuantizedWeight(spec, halves(tensors["codes"]), tensors["absmax"].contiguous())


def halves(codes: Tensor) -> Tensor:
    """Return the codes uint8 [O, I] of packed ones [O, I/2]."""
    return torch.stack([codes & LOW_HALF, codes >> 4], -1).flatten(-2)


LOW_HALF = 0x0F
"""Mask of the low half of a byte."""
