"""The reference: dequantizes on every call. Slow, small, right on every device."""

from __future__ import annotations

import functools
import json
from dataclasses import fields
from typing import TYPE_CHECKING

from torch.nn import functional

from ar_kernels.backends.base import PackedWeight
from ar_kernels.backends.support import Support
from ar_kernels.weight import KernelError, QuantizedWeight
from ar_schemes import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ar_kernels.backends.base import Need

_WORD = 7  # bytes per integer of meta: 56 bits stay positive in an int64


class Reference:
    """Keeps codes and scales as they are; memory of the codes plus one dense weight per call."""

    name = "reference"
    priority = 0
    status = "verified on cpu, untried elsewhere"
    support = Support()
    keeps_codes = True

    def missing(self) -> str | None:
        """Return None: it needs torch only."""
        return None

    def refuses(self, need: Need) -> str | None:
        """Return why it cannot serve a layer, or None."""
        return refuses_weight_only(need)

    def pack(self, weight: QuantizedWeight, need: Need) -> PackedWeight:
        """Return the weight's own tensors on the device of the need."""
        tensors = weight.to(need.device).tensors()
        return PackedWeight(tensors, encode_meta(weight.spec, tuple(tensors)))

    def unpack(self, packed: PackedWeight, need: Need) -> QuantizedWeight:  # noqa: ARG002
        """Return the weight; the exact inverse of `pack`."""
        return QuantizedWeight.from_tensors(decode_meta(packed.meta)[0], packed.buffers)

    def buffer_names(self, meta: Sequence[int]) -> tuple[str, ...]:
        """Return the names of the buffers of a packed weight with this `meta`, in order."""
        return decode_meta(tuple(meta))[1]

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O], dtype of x."""
        spec, _ = decode_meta(packed.meta)
        weight = QuantizedWeight.from_tensors(spec, packed.buffers).dequantize(x.dtype)
        return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def refuses_weight_only(need: Need) -> str | None:
    """Return why a need is beyond "dequantize, then a float product", or None."""
    from ar_kernels.registry import data_type  # the registry holds the backends

    if need.activation is not None:
        return f"activations are not quantized here, the layer asks for {need.activation}"
    if not need.dtype.is_floating_point or need.dtype.itemsize < 2:
        return f"activations must be float of 16 bits or more, not {need.dtype}"
    try:
        return data_type(need.spec.data_type).refuses(need.spec)
    except KernelError as error:
        return str(error)


def encode_meta(spec: TensorSpec, names: tuple[str, ...]) -> tuple[int, ...]:
    """Return a spec and buffer names as integers, the only plain values an op passes on.

    Fields at their default are left out: graph compilers guard every integer.
    """
    plain, default = spec.to_dict(), TensorSpec().to_dict()
    changed = {k: v for k, v in plain.items() if v != default[k]}
    text = json.dumps([changed, list(names)], separators=(",", ":")).encode()
    return tuple(int.from_bytes(text[i : i + _WORD], "little") for i in range(0, len(text), _WORD))


@functools.lru_cache(maxsize=512)
def decode_meta(meta: tuple[int, ...]) -> tuple[TensorSpec, tuple[str, ...]]:
    """Return what `encode_meta` was given."""
    text = b"".join(n.to_bytes(_WORD, "little") for n in meta).rstrip(b"\0")
    changed, names = json.loads(text)
    known = {f.name for f in fields(TensorSpec)}
    if not known >= changed.keys():
        msg = f"reference: unknown fields {changed.keys() - known} in the meta"
        raise KernelError(msg)
    return TensorSpec.from_dict(TensorSpec().to_dict() | changed), tuple(names)
