"""An output head that computes with its bf16 weight in 12 bits: the same values in fewer bytes.

Of a small model the head is the largest part that a new token reads. Its own weight stays, since it
is the embedding too where the two are tied, and is what many rows are multiplied by and what is
saved; its pages of the checkpoint's file are given back, so memory does not grow where it is mapped
from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.native import compact, steps
from ar_kernels.native.modules import NativeLinear, is_plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ar_kernels.hf.memory import Returning

_SPOTS = 64


class CompactHead(NativeLinear):
    """A float layer that multiplies a few rows by a compact copy of its weight.

    Once the weight is another one, or was written to, the layer computes with the weight itself.
    What is written by way of `weight.data` leaves no trace in torch: it is seen where it changes
    one of some values all over the weight, as a merged adapter does, not where it is a row or two.
    """

    blob: Tensor | None
    outliers: int
    _spots: Tensor
    _seen: tuple[int, int, Tensor]

    @classmethod
    def compacting(
        cls, given: NativeLinear, done_with: Callable[[Tensor], None] | None = None
    ) -> CompactHead | None:
        """Return the layer that shares the parameters of another; None: it does not pay.

        `done_with` is called with each part of the weight that was read.
        """
        made = compact.compact(given.weight.detach(), done_with)
        if made is None:
            return None
        head = cls.of(given)
        head.register_buffer("blob", made.blob, persistent=False)
        head.outliers = made.outliers
        drawn = torch.Generator().manual_seed(0)
        head._spots = torch.randint(given.weight.numel(), (_SPOTS,), generator=drawn)  # noqa: SLF001
        head._seen = head._sight()  # noqa: SLF001
        return head

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., I] times the weight transposed, plus bias: [..., O]."""
        weight = self.weight
        if (
            self.blob is not None
            and x.numel() <= steps.FLOAT_ROWS * self.in_features
            and x.dtype == weight.dtype
            and not torch.is_autocast_enabled("cpu")
            and is_plain(x, weight)
            and self._is_current()
        ):
            out: Tensor = torch.ops.ar_kernels.step_compact_linear(
                x, self.blob, self.out_features, self.outliers, self.bias
            )
            return out
        return super().forward(x)

    def extra_repr(self) -> str:
        """Return what nn.Linear says, and the width."""
        how = "" if self.blob is None else ", compact: 12 bits without loss"
        return f"{super().extra_repr()}{how}"

    def _sight(self) -> tuple[int, int, Tensor]:
        """Return where the weight is, how often it was written to, and some of its values."""
        weight = self.weight.detach()
        version = 0 if weight.is_inference() else weight._version  # noqa: SLF001 - torch's own count
        return weight.data_ptr(), version, weight.reshape(-1)[self._spots]

    def _is_current(self) -> bool:
        """Tell whether the weight is what was compacted; the copy goes where it is not."""
        place, version, values = self._sight()
        was = self._seen
        current = place == was[0] and version == was[1] and torch.equal(values, was[2])
        if not current:
            self.blob = None
        return current

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompactHead:
        """Move or cast as nn.Module does, without the copy of a weight that is left behind."""
        super()._apply(fn, recurse)
        if self.weight.device.type != "cpu" or self.weight.data_ptr() != self._seen[0]:
            self.blob = None
        return self


def compact_head(model: Any, returning: Returning | None = None) -> bool:
    """Give a model on the CPU a compact head where it has a bf16 one, and return whether it has.

    Args:
        model: of transformers, its float layers `NativeLinear`.
        returning: gives the weight's memory back, which is read only now and then from now on.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if type(head) is not NativeLinear or head.weight.dtype != torch.bfloat16:
        return False
    if not head.weight.is_contiguous():
        return False
    done_with = None if returning is None else returning.seldom_read(head.weight)
    made = CompactHead.compacting(head, done_with)
    if made is not None:
        model.set_output_embeddings(made)
    return made is not None
