"""The float weight of a quantized layer, for models that look at it instead of calling the layer.

Models ask layers for `weight.dtype` or `weight.device` (two hundred places in Transformers), some
multiply by `weight` themselves. The former must cost nothing, the latter must work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ar_kernels.linear import QuantLinear


class LazyWeight(torch.Tensor):
    """The weight [O, I] of a layer: shape, type and device now, its numbers when an op needs them.

    Every op dequantizes anew. What an op writes into it is lost.
    """

    _layer: QuantLinear
    _is_hf_initialized = True  # Transformers leaves such tensors as they were loaded

    # torch's own way to leave everything to __torch_dispatch__
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment] # noqa: SLF001

    @staticmethod
    def __new__(cls, layer: QuantLinear) -> LazyWeight:
        """Return the stand-in for the weight of a layer."""
        made: LazyWeight = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, (layer.rows, layer.columns), dtype=layer.dtype, device=layer.device
        )
        made._layer = layer  # noqa: SLF001
        return made

    def numbers(self) -> torch.Tensor:
        """Return the weight as a plain tensor."""
        layer = self._layer
        if layer.device.type == "meta":
            return torch.empty(layer.rows, layer.columns, dtype=layer.dtype, device="meta")
        with torch.no_grad():
            return layer.quantized().dequantize(layer.dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Return what it stands for, without numbers."""
        return f"LazyWeight({self._layer})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch leaves `func` out
        cls,
        func: Callable[..., Any],
        types: Iterable[type],  # noqa: ARG003
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return what an op gives for the numbers."""
        args, kwargs = tree_map_only(cls, cls.numbers, (args, kwargs or {}))
        return func(*args, **kwargs)
