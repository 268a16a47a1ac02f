"""`cpu_native`: our own CPU kernels, which multiply packed weights without expanding them.

AVX512-BF16, AVX512, AVX2 or plain C++, chosen when the process runs. Weights are integers of 2 to 8
bits, FP8, MX, NVFP4 and what else is a scale times a table of values, in any groups that are
multiples of 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_kernels.backends.base import PackedWeight
from ar_kernels.native import library
from ar_kernels.native.bound import Bound
from ar_kernels.native.packing import FLAGS, TWO_LEVELS, pack, unpack
from ar_kernels.native.product import linear
from ar_kernels.native.storage import refuses

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from ar_kernels.backends.base import BoundProduct, Need
    from ar_kernels.weight import QuantizedWeight


class CpuNative:
    """Packed codes, scales beside them in memory; bytes of the checkpoint."""

    name = "cpu_native"
    priority = 100
    status = "verified on x86-64 (AMD Zen 4, all four instruction sets)"
    keeps_codes = True

    def missing(self) -> str | None:
        """Return what this installation or processor lacks, or None."""
        return library.missing()

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        if need.device != "cpu":
            return f"it runs on the CPU, not on {need.device}"
        if need.activation is not None:
            return f"activations are not quantized here, the layer asks for {need.activation}"
        if need.dtype not in library.DTYPES:
            return f"activations must be float32, float16 or bfloat16, not {need.dtype}"
        return refuses(need.spec)

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:  # noqa: ARG002
        """Return the weight as one blob, and its tensor scale beside it where it has one.

        Ranges of activations are the layer's, not the product's.
        """
        weight = weight.to("cpu")
        blob, meta = pack(weight)
        beside = {name: weight.extra[name] for name in self.buffer_names(meta)[1:]}
        return PackedWeight({"blob": blob, **beside}, meta)

    def unpack(self, packed: PackedWeight, need: Need) -> QuantizedWeight:
        """Return the weight; the exact inverse of `pack`."""
        extra = {name: tensor for name, tensor in packed.buffers.items() if name != "blob"}
        return unpack(packed.buffers["blob"], packed.meta, need.spec, extra)

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        return ("blob", "global_scale") if meta[FLAGS] & TWO_LEVELS else ("blob",)

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
        return linear(x, packed.buffers["blob"], packed.meta, bias)

    def bind(
        self, buffers: Mapping[str, Tensor], meta: tuple[int, ...], dtype: torch.dtype
    ) -> BoundProduct | None:
        """Return the product with a packed weight, for calls of few rows."""
        if dtype not in library.DTYPES or self.missing() is not None:
            return None
        name, blob = next(iter(buffers.items()))
        return Bound(name, blob, meta, dtype)
