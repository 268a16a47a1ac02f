"""The tensors of a `QuantLinear`: as files hold them, as layouts want them, ready for a backend."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_kernels.layouts.base import TensorFact
    from ar_schemes import TensorSpec

RANGES = {
    "input_scale": "static",
    "input_global_scale": "static",
    "input_zero_point": "static_zero",
}
"""Names in `QuantizedWeight.extra` to what `ops.quantize_input` calls them."""


def ready_name(key: str) -> str:
    """Return the name of the buffer that holds a backend's tensor; modules allow no dots."""
    return "ready_" + key.replace(".", "_")


READY_BLOB, READY_ORDER = ready_name("blob"), ready_name("order")
"""Names of a packed weight of `cpu_native`, and of the order in which a layer takes its input."""


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device, empty where it has no data to bring along."""
    if tensor.device.type == "meta" and device.type != "meta":
        return torch.empty_like(tensor, device=device)
    return tensor.to(device)


def as_foretold(tensor: Tensor, fact: TensorFact) -> Tensor:
    """Return a tensor of a checkpoint as its layout wants it: the same bytes in another shape."""
    if tensor.dtype != fact.dtype and tensor.dtype.itemsize == fact.dtype.itemsize == 1:
        tensor = tensor.contiguous().view(fact.dtype)
    elif tensor.dtype != fact.dtype and tensor.dtype.is_floating_point and tensor.numel() > 1:
        cast = tensor.to(fact.dtype)
        if not torch.equal(cast.to(tensor.dtype), tensor):
            msg = f"scales in {tensor.dtype} are not exact in {fact.dtype}, which the layout holds"
            raise KernelError(msg)
        tensor = cast
    if tuple(tensor.shape) != fact.shape and tensor.numel() == math.prod(fact.shape):
        tensor = tensor.reshape(fact.shape)
    return tensor


def as_stored(tensor: Tensor, fact: TensorFact) -> Tensor:
    """Return a tensor of a layout as the checkpoint holds it; the inverse of `_as`."""
    if tensor.dtype != fact.dtype:
        same = tensor.dtype.itemsize == fact.dtype.itemsize == 1
        tensor = tensor.view(fact.dtype) if same else tensor.to(fact.dtype)
    return tensor.reshape(fact.shape)


def ranges_of(extra: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
    """Return the ranges of static activations, float32 [1], under the names of the op.

    Files hold zero points of signed codes, the op counts from the least code; those of symmetric
    activations, which some writers store, mean nothing.
    """
    out = {key: extra[name].float().reshape(1) for name, key in RANGES.items() if name in extra}
    zero = out.pop("static_zero", None)
    if zero is not None and not spec.symmetric:
        out["static_zero"] = zero + 2 ** (spec.bits - 1)
    return out
