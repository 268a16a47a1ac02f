"""What a `QuantLinear` holds of its checkpoint, and what it makes again where it let that go."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ar_kernels import registry
from ar_kernels.backends.base import ExactBackend, PackedWeight
from ar_kernels.layer_tensors import RANGES, READY_ORDER, as_stored
from ar_kernels.weight import CHANNEL_ORDER

if TYPE_CHECKING:
    from ar_kernels.backends.base import Need
    from ar_kernels.layouts.base import TensorFact
    from ar_kernels.weight import QuantizedWeight


class StoredLayer(nn.Module):
    """A layer whose checkpoint's tensors may be gone while a backend's packed weight has them.

    Attributes:
        layout: name of the bit order of the checkpoint's tensors.
        backend: name of the backend that packed the weight; None: none has.
    """

    layout: str
    backend: str | None
    _facts: dict[str, TensorFact]
    """The checkpoint's tensors."""
    _released: tuple[str, ...]
    """Those that were let go."""
    _keys: tuple[str, ...]
    """The backend's names of its buffers."""
    _ready: tuple[str, ...]
    """The layer's names of those."""
    _meta: list[int]
    _packed_for: Need

    def _buffer(self, name: str) -> Tensor:
        found = self._buffers[name]
        assert found is not None
        return found

    def _unpacked(self) -> QuantizedWeight:
        """Return the weight out of the backend's tensors."""
        assert self.backend is not None
        backend = registry.backend(self.backend)
        assert isinstance(backend, ExactBackend)
        held = dict(zip(self._keys, map(self._buffer, self._ready), strict=True))
        packed = PackedWeight(held, tuple(self._meta))
        weight = backend.unpack(packed, self._packed_for)
        extra = dict(weight.extra)
        for suffix in self._facts:
            found = self._buffers.get(suffix)
            if suffix in RANGES and found is not None:
                extra[suffix] = found.float().reshape(1)
        order = self._buffers.get(READY_ORDER)
        if order is not None:
            extra[CHANNEL_ORDER] = order.int()
        return replace(weight, extra=extra)

    def _remade(self) -> dict[str, Tensor]:
        """Return the tensors that were let go, as the checkpoint holds them."""
        if not self._released:
            return {}
        with torch.no_grad():
            weight = self._unpacked()
            if weight.zero_point is not None:
                # the others do not depend on it, and files may hold one that their layout
                # cannot write
                weight = replace(weight, zero_point=torch.ones_like(weight.zero_point))
            packed = registry.layout(self.layout).pack(weight)
            return {k: as_stored(packed[k], self._facts[k]) for k in self._released}

    def _restore(self) -> None:
        """Hold again what was let go."""
        self._buffers.update(self._remade())
        self._released = ()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Save what a checkpoint holds."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + suffix: tensor for suffix, tensor in self._remade().items()}
