"""`QuantLinear`: the nn.Module that holds a quantized layer and calls the kernel of a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ar_kernels import ops, registry
from ar_kernels.backends.base import Need
from ar_kernels.backends.select import choose
from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ar_kernels.layouts.base import TensorFact
    from ar_kernels.weight import QuantizedWeight
    from ar_schemes import TensorSpec

_READY = "ready_"


class QuantLinear(nn.Module):
    """A linear layer [I] -> [O] whose weight is quantized.

    Its state dict holds exactly the tensors of a checkpoint (`qweight`, `scales`, ... as the
    layout says, and `bias`), so loading and saving never change a bit. `prepare` puts beside
    them what a backend computes with; that never reaches a state dict.
    """

    def __init__(
        self,
        spec: TensorSpec,
        rows: int,
        columns: int,
        *,
        layout: str,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        """Make an empty layer, to be filled by `load_state_dict` or a checkpoint loader.

        Args:
            spec: how the weight is represented.
            rows: out features O.
            columns: in features I.
            layout: name of the bit order of the packed tensors.
            bias: whether there is a bias [O].
            dtype: type of the bias and of the computation.
            device: where the buffers live; `meta` holds shapes only.

        Raises:
            KernelError: no such layout, or it cannot hold this weight.
        """
        super().__init__()
        found = registry.layout(layout)
        why = found.refuses(spec, rows, columns)
        if why is not None:
            raise KernelError(why)
        self.spec = spec
        self.rows = rows
        self.columns = columns
        self.layout = layout
        self.dtype = dtype
        self.backend: str | None = None
        self._prefer: str | None = None
        self._ready: tuple[str, ...] = ()
        self._meta: list[int] = []
        self._facts: dict[str, TensorFact] = found.facts(spec, rows, columns)
        for suffix, fact in self._facts.items():
            empty = torch.zeros(fact.shape, dtype=fact.dtype, device=device)
            self.register_buffer(suffix, empty)
        self.bias: nn.Parameter | None = None
        if bias:
            zeros = torch.zeros(rows, dtype=dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight,
        *,
        layout: str,
        bias: Tensor | None = None,
        dtype: torch.dtype,
    ) -> QuantLinear:
        """Return the layer of a weight [O, I], its packed tensors on the weight's device.

        Raises:
            KernelError: the layout cannot hold the weight.
        """
        rows, columns = weight.shape[-2:]
        device = weight.codes.device
        made = cls(
            weight.spec,
            rows,
            columns,
            layout=layout,
            bias=bias is not None,
            dtype=dtype,
            device=device,
        )
        for suffix, tensor in registry.layout(layout).pack(weight).items():
            setattr(made, suffix, tensor.to(device))
        if made.bias is not None and bias is not None:
            made.bias.data.copy_(bias)
        return made

    @property
    def in_features(self) -> int:
        """In features I, under the name nn.Linear gives it."""
        return self.columns

    @property
    def out_features(self) -> int:
        """Out features O, under the name nn.Linear gives it."""
        return self.rows

    @property
    def device(self) -> torch.device:
        """Device of the packed tensors."""
        return self._buffer(next(iter(self._facts))).device

    def quantized(self) -> QuantizedWeight:
        """Return the weight, read from the packed tensors.

        Raises:
            KernelError: the packed tensors contradict the spec, or group channels in another
                order than that of the input (GPTQ with `desc_act`).
        """
        packed = {suffix: self._buffer(suffix) for suffix in self._facts}
        return registry.layout(self.layout).unpack(packed, self.spec, self.rows, self.columns)

    def prepare(self, prefer: str | None = None) -> None:
        """Choose a backend and pack the weight for it.

        Args:
            prefer: name of a backend; None leaves the choice to the environment variable
                AR_BACKEND and the backends' ranks.

        Raises:
            KernelError: there are no tensors yet (meta device), or no backend can serve.
        """
        if self.device.type == "meta":
            msg = (
                "a QuantLinear on the meta device has no tensors to prepare; load its state "
                "dict first"
            )
            raise KernelError(msg)
        need = Need(self.spec, self.rows, self.columns, self.device.type, self.dtype)
        backend = choose(need, prefer).backend
        with torch.no_grad():
            packed = backend.pack(self.quantized(), need)
        self._release()
        for key, tensor in packed.buffers.items():
            self.register_buffer(_READY + key, tensor, persistent=False)
        self._ready = tuple(_READY + key for key in packed.buffers)
        self._meta = list(packed.meta)
        self._prefer = prefer
        self.backend = backend.name

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x.

        Computed in the layer's `dtype`. The first call prepares the layer if nobody has.
        """
        if self.backend is None:
            self.prepare(self._prefer)
        assert self.backend is not None
        ready = [self._buffer(name) for name in self._ready]
        out = ops.quant_linear(
            x.to(self.dtype), ready, self._meta, self.bias, self.backend, self.rows
        )
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """Return shape, scheme, layout and backend for `print(model)`."""
        return (
            f"in_features={self.columns}, out_features={self.rows}, "
            f"bias={self.bias is not None}, {self.spec}, layout={self.layout}, "
            f"backend={self.backend or 'not prepared'}"
        )

    def _buffer(self, name: str) -> Tensor:
        found = self._buffers[name]
        assert found is not None
        return found

    def _release(self) -> None:
        for name in self._ready:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        self._ready = ()
        self.backend = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move or cast as nn.Module does, but never cast the checkpoint's own tensors."""
        before = (self.device, self.dtype)
        was_ready = self.backend is not None
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        kept = {suffix: self._buffer(suffix) for suffix in self._facts}
        super()._apply(fn, recurse)
        for suffix, tensor in kept.items():
            moved = self._buffer(suffix)
            if moved.dtype != tensor.dtype:
                self._buffers[suffix] = _on(tensor, moved.device)
        self.dtype = dtype
        if before != (self.device, dtype):
            self._release()
            if was_ready and self.device.type != "meta":
                self.prepare(self._prefer)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load as nn.Module does, then compute with the new tensors."""
        was_ready = self.backend is not None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if was_ready and any(prefix + suffix in state_dict for suffix in self._facts):
            self.prepare(self._prefer)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device, empty where it has no data to bring along."""
    if tensor.device.type == "meta" and device.type != "meta":
        return torch.empty_like(tensor, device=device)
    return tensor.to(device)
