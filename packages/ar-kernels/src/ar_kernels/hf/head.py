"""An output head in fewer bits, made of a 16-bit one as a model is opened, where the user asks.

Of a small model the head is the largest part that a new token reads: a third of all bytes of a
Qwen3-0.6B in 4 bits. Rounding it changes the numbers, so nothing does so unasked. The float weight
stays, since it is the embedding too where the two are tied, and is what `save_pretrained` writes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ar_kernels import registry
from ar_kernels.native import library
from ar_kernels.native.modules import NativeLinear
from ar_kernels.native.ops import native_linear
from ar_kernels.native.packing import join, pack
from ar_kernels.native.storage import UNIT
from ar_kernels.weight import KernelError
from ar_schemes import Granularity, Span, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

ENV = "AR_KERNELS_HEAD_BITS"
GROUPS = {4: 32, 5: 32, 6: 64, 8: 128}
"""Widths that may be asked for, each with the inputs that share a scale."""
OWN = 16
"""Asks for the head as the checkpoint holds it, not even made compact."""
_ROWS = 1 << 14
"""Features rounded at a time: 64 MB of float32 for 1024 inputs."""


class RoundedHead(NativeLinear):
    """A float layer that computes with a rounded copy of its weight."""

    bits: int
    blob: Tensor
    meta: tuple[int, ...]

    @classmethod
    def rounding(cls, given: nn.Linear, bits: int) -> RoundedHead:
        """Return the layer that shares the parameters of another and computes in `bits`.

        Raises:
            KernelError: no such width, or inputs that no group fits.
        """
        if bits not in GROUPS:
            allowed = [*sorted(GROUPS), OWN]
            msg = f"a head of {bits} bits cannot be made: ask for one of {allowed}"
            raise KernelError(msg)
        inputs = given.in_features
        group = GROUPS[bits]
        while inputs % group and group > UNIT:
            group //= 2
        if inputs % group:
            msg = f"a head of {inputs} inputs cannot be rounded: they must be multiples of {UNIT}"
            raise KernelError(msg)
        made = cls.of(given)
        spec = TensorSpec(bits=bits, granularity=Granularity(Span.GROUP, (group,)))
        blob, meta = _packed(given.weight.detach(), spec)
        made.register_buffer("blob", blob, persistent=False)
        made.bits, made.meta = bits, meta
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., I] times the rounded weight transposed, plus bias: [..., O].

        Differentiable in x and bias.
        """
        return native_linear(x, self.blob, list(self.meta), self.bias)

    def extra_repr(self) -> str:
        """Return what nn.Linear says, and the width."""
        return f"{super().extra_repr()}, computed in {self.bits} bits"


def _packed(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, tuple[int, ...]]:
    """Return (blob, meta) of a float weight, rounded to the nearest in parts."""
    numbers = registry.data_type(spec.data_type)
    parts = []
    with torch.no_grad():
        for some in weight.split(_ROWS):
            wide = some.float()
            parts.append(pack(numbers.quantize(wide, spec, numbers.parameters(wide, spec))))
    return join(parts, experts=False) if len(parts) > 1 else parts[0]


def asked_bits(bits: int | None) -> int | None:
    """Return the width of the head that the user asks for, here or in AR_KERNELS_HEAD_BITS.

    Raises:
        KernelError: what the environment says is no number of bits.
    """
    said = os.environ.get(ENV, "").strip()
    if bits is not None or not said:
        return bits
    if not said.isdigit():
        msg = f"{ENV}={said} is no number of bits: use one of {[*sorted(GROUPS), OWN]}"
        raise KernelError(msg)
    return int(said)


def round_head(model: Any, bits: int) -> bool:
    """Give a model on the CPU a rounded head, and return whether it has one now.

    Args:
        model: of transformers, with a float head.
        bits: 4, 5, 6 or 8.

    Raises:
        KernelError: a width that is not served, or no compiled kernels here.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight.device.type != "cpu":
        return False
    why = library.missing()
    if why is not None:
        msg = f"a head of {bits} bits needs the compiled CPU kernels; missing: {why}"
        raise KernelError(msg)
    model.set_output_embeddings(RoundedHead.rounding(head, bits))
    return True
