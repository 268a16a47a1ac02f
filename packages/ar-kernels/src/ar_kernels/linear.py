"""`QuantLinear`: the nn.Module that holds a quantized layer and calls the kernel of a backend."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ar_kernels import ops, registry
from ar_kernels.backends.base import BindingBackend, ExactBackend, Need
from ar_kernels.backends.reference import encode_meta
from ar_kernels.backends.select import choose
from ar_kernels.layer_tensors import (
    READY_BLOB,
    READY_ORDER,
    as_foretold,
    on_device,
    ranges_of,
    ready_name,
)
from ar_kernels.layouts.base import TensorFact, optional_of
from ar_kernels.lazy_weight import LazyWeight
from ar_kernels.numerics.activation import refuses_activation
from ar_kernels.stored_layer import StoredLayer
from ar_kernels.weight import CHANNEL_ORDER, KernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ar_kernels.backends.base import BoundProduct
    from ar_kernels.weight import QuantizedWeight
    from ar_schemes import TensorSpec

_STATIC, _ZERO = "static", "static_zero"
_SCALES = ("scales", "weight_scale", "weight_scale_inv")


class QuantLinear(StoredLayer):
    """A linear layer [I] -> [O] whose weight is quantized.

    Its state dict holds exactly the tensors of a checkpoint (`qweight`, `scales`, ... as the
    layout says, and `bias`), so loading and saving never change a bit. `prepare` puts beside
    them what a backend computes with; that never reaches a state dict. Where the backend keeps
    the codes, those of the checkpoint and their scales are let go and made again when asked for.
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
        activation: TensorSpec | None = None,
        stored: Mapping[str, TensorFact] | None = None,
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
            activation: how the input is quantized before the product, None: not.
            stored: shape and type of tensors as a checkpoint holds them: those that differ from
                the layout's, and those that may be absent (ranges of static activations).

        Raises:
            KernelError: no such layout, or it cannot hold this weight or quantize this input.
        """
        super().__init__()
        found = registry.layout(layout)
        why = found.refuses(spec, rows, columns)
        if why is None and activation is not None:
            why = refuses_activation(activation, columns)
        if why is not None:
            raise KernelError(why)
        self.activation = activation
        self.spec = spec
        self.rows = rows
        self.columns = columns
        self.layout = layout
        self.dtype = dtype
        self.backend = None
        self._prefer: str | None = None
        self._ready = self._keys = self._released = ()
        self._meta = []
        self._quantizes: list[int] | None = None
        self._bound: BoundProduct | None = None
        self._alone = False
        self._foretold = {**optional_of(found), **found.facts(spec, rows, columns)}
        self._facts = found.facts(spec, rows, columns)
        self._facts |= {k: v for k, v in (stored or {}).items() if k in self._foretold}
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
        activation: TensorSpec | None = None,
    ) -> QuantLinear:
        """Return the layer of a weight [O, I], its packed tensors on the weight's device.

        `activation` says how the input is quantized; ranges of static activations are taken from
        `weight.extra`.

        Raises:
            KernelError: the layout cannot hold the weight.
        """
        rows, columns = weight.shape[-2:]
        device = weight.codes.device
        packed = registry.layout(layout).pack(weight)
        made = cls(
            weight.spec,
            rows,
            columns,
            layout=layout,
            bias=bias is not None,
            dtype=dtype,
            device=device,
            activation=activation,
            stored={k: TensorFact(tuple(v.shape), v.dtype) for k, v in packed.items()},
        )
        for suffix, tensor in packed.items():
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
        names = (*self._facts, *self._ready)
        return next(b for name in names if (b := self._buffers.get(name)) is not None).device

    def quantized(self) -> QuantizedWeight:
        """Return the weight, read from the packed tensors or from those of the backend.

        Raises:
            KernelError: the packed tensors contradict the spec.
        """
        if self._released:
            return self._unpacked()
        packed = {k: as_foretold(self._buffer(k), self._foretold[k]) for k in self._facts}
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
        with torch.no_grad():
            weight = self.quantized()
            order = weight.extra.get(CHANNEL_ORDER)
            need = self.need()
            if order is not None:  # the input is sorted before the product, hence quantized before
                need = replace(need, activation=None)
                extra = {k: v for k, v in weight.extra.items() if k != CHANNEL_ORDER}
                weight = replace(weight, extra=extra)
            choice = choose(need, prefer)
            backend = choice.backend
            quantizes = self.activation is not None and choice.need.activation is None
            ranges = {}
            if quantizes and self.activation is not None:
                ranges = ranges_of(weight.extra, self.activation)
            static = self.activation is not None and not self.activation.dynamic
            if quantizes and static and _STATIC not in ranges:
                msg = f"activations {self.activation} are static, but the weight holds no range"
                raise KernelError(msg)
            packed = backend.pack(weight, choice.need)
        self._restore()
        self._release()
        if order is not None:
            order = order.to(self.device).long()
            self.register_buffer(READY_ORDER, order, persistent=False)
        for key, tensor in packed.buffers.items():
            self.register_buffer(ready_name(key), tensor, persistent=False)
        if self.activation is not None and quantizes:
            self._quantizes = list(encode_meta(self.activation, ()))
        for key, tensor in ranges.items():
            self.register_buffer(ready_name(key), tensor.to(self.device), persistent=False)
        self._keys = tuple(packed.buffers)
        self._ready = tuple(map(ready_name, self._keys))
        self._meta = list(packed.meta)
        self._prefer = prefer
        self.backend = backend.name
        self._packed_for = choice.need
        if isinstance(backend, ExactBackend):  # it holds codes and scales: one copy is enough
            codes = max(self._facts, key=lambda k: self._buffer(k).nbytes)
            self._released = tuple(k for k in self._facts if k == codes or k in _SCALES)
            for suffix in self._released:
                del self._buffers[suffix]  # torch 2.13 cannot export a buffer that is None
        self._bind()

    def leave_activations(self) -> None:
        """Compute with activations as they come from now on, whatever the scheme says.

        For comparing the weight with a float layer; a checkpoint that is saved stays as it was.
        """
        if self.activation is None:
            return
        self.activation = None
        if self.backend is not None:
            self.prepare(self._prefer)

    def need(self) -> Need:
        """Return what the layer asks of a backend."""
        return Need(
            self.spec, self.rows, self.columns, self.device.type, self.dtype, self.activation
        )

    def ready(self) -> tuple[list[Tensor], list[int], str] | None:
        """Return the buffers, integers and backend of the product, prepared where nobody has yet.

        None where the product is not all: the input is quantized or sorted, or there is a bias.
        """
        if self.backend is None:
            self.prepare(self._prefer)
        assert self.backend is not None
        if self._quantizes is not None or READY_ORDER in self._buffers or self.bias is not None:
            return None
        return [self._buffer(name) for name in self._ready], self._meta, self.backend

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x.

        Computed in the layer's `dtype`, x quantized first where the scheme says so. The first
        call prepares the layer if nobody has.
        """
        bound = self._bound
        if torch.compiler.is_compiling() or self.bias is not None:
            bound = None
        if bound is not None and self._alone:
            quick = bound(x, self._buffers)
            if quick is not None:
                return quick
        if self.backend is None:
            self.prepare(self._prefer)
        assert self.backend is not None
        given = x if x.dtype == self.dtype else x.to(self.dtype)
        if self._quantizes is not None:
            static, zero = (self._buffers.get(ready_name(key)) for key in (_STATIC, _ZERO))
            given = ops.quantized_input(given, self._quantizes, static, zero)
        order = self._buffers.get(READY_ORDER)
        if order is not None:
            given = given.index_select(-1, order)
        out = None if bound is None else bound(given, self._buffers)
        if out is None:
            ready = [self._buffer(name) for name in self._ready]
            out = ops.multiply(given, ready, self._meta, self.bias, self.backend, self.rows)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def packed_blob(self) -> Tensor | None:
        """Return the packed weight where `cpu_native` computes with it as the input comes."""
        if self.backend != "cpu_native" or self._quantizes is not None:
            return None
        return None if READY_ORDER in self._buffers else self._buffers.get(READY_BLOB)

    def settle(self, blob: Tensor) -> None:
        """Compute with a copy of the packed weight from now on."""
        self._buffers[READY_BLOB] = blob
        self._bind()

    def packed_meta(self) -> tuple[int, ...]:
        """Return the backend's integers of the packed weight."""
        return tuple(self._meta)

    def extra_repr(self) -> str:
        """Return shape, scheme, layout and backend for `print(model)`."""
        return (
            f"in_features={self.columns}, out_features={self.rows}, "
            f"bias={self.bias is not None}, {self.spec}{self._acts()}, layout={self.layout}, "
            f"backend={self.backend or 'not prepared'}"
        )

    def __getattr__(self, name: str) -> Any:
        """Return a tensor of the checkpoint also after it was let go, and a float weight."""
        if name in self.__dict__.get("_released", ()):
            return self._remade()[name]
        if name == "weight" and name not in self.__dict__.get("_facts", (name,)):
            return LazyWeight(self)
        return super().__getattr__(name)

    def _acts(self) -> str:
        return "" if self.activation is None else f", activations={self.activation}"

    def _bind(self) -> None:
        """Prepare the product where there is no bias, and tell whether it is all."""
        assert self.backend is not None
        backend = registry.backends().get(self.backend)  # none where a copy came without it
        self._alone, self._bound = self.ready() is not None, None
        if self.bias is None and isinstance(backend, BindingBackend):
            held = {name: self._buffer(name) for name in self._ready}
            self._bound = backend.bind(held, tuple(self._meta), self.dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of another layer, with a product of its own."""
        super().__setstate__(state)
        if self.backend is not None:
            self._bind()

    def _release(self) -> None:
        for name in (*self._ready, ready_name(_STATIC), ready_name(_ZERO), READY_ORDER):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        self._ready = ()
        self._quantizes = self._bound = None
        self.backend = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move or cast as nn.Module does, but never cast the checkpoint's own tensors."""
        before = (self.device, self.dtype)
        was_ready = self.backend is not None
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        dtype = probe.dtype
        if before != (probe.device, dtype):
            self._restore()
        kept = {name: held for name, held in self._buffers.items() if held is not None}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = self._buffer(name)
            if moved.dtype != tensor.dtype:
                self._buffers[name] = on_device(tensor, moved.device)
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
        self._restore()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if was_ready:
            self.prepare(self._prefer)
