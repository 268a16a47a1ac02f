"""Weights as matrices [O, I]: whole parameters, or parts of parameters that hold many matrices.

Transformers keeps the experts of a layer in one parameter [E, O, I], gate and up projections
joined by rows or row by row, in some families turned over. Each expert's matrix is addressed where
it is; nothing is taken apart. `assembled` is the way back: it makes parameters of the weights of
their parts, with gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight

    Pair = tuple["WeightRef", Tensor]


@dataclass(frozen=True)
class WeightRef:
    """One weight, addressed by name, seen as [O, I].

    Attributes:
        layer: name of the layer.
        parameter: name of the parameter, relative to the block (or the model) it is in.
        transposed: the matrix is stored as [I, O] (Conv1D of GPT-2, experts of some families).
        expert: place in the first dimension of a parameter that holds many matrices; None: the
            parameter is one matrix.
        rows: (first, end, step) of the rows of the matrix, where others of it are another
            layer's; None: all.
    """

    layer: str
    parameter: str
    transposed: bool
    expert: int | None = None
    rows: tuple[int, int, int] | None = None

    @property
    def whole(self) -> bool:
        """True when the parameter holds nothing else."""
        return self.expert is None and self.rows is None

    @property
    def module(self) -> str:
        """Name of the module that holds the parameter."""
        return self.parameter.rpartition(".")[0]

    def view(self, stored: Tensor) -> Tensor:
        """Return the weight [O, I] in the stored parameter, as a view of it."""
        matrix = stored if self.expert is None else stored[self.expert]
        matrix = matrix.t() if self.transposed else matrix
        return matrix if self.rows is None else matrix[slice(*self.rows)]


def assembled(pairs: Iterable[Pair], like: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return parameters as they are stored, made of weights [O, I], by parameter name.

    Gradients go back to the weights. Parts for which no weight is given are as they were.

    Args:
        pairs: where a weight belongs, and the weight.
        like: a parameter by its name, as stored; on the meta device only where every part of it
            is given.
    """
    groups: dict[str, list[Pair]] = {}
    for ref, weight in pairs:
        groups.setdefault(ref.parameter, []).append((ref, weight))
    return {name: _stored(members, like(name)) for name, members in groups.items()}


def replacements(
    block: nn.Module,
    refs: Iterable[WeightRef],
    weights: Mapping[str, QuantizedWeight],
    before: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the parameters of a block with quantized weights in their places, by name.

    Args:
        block: a module, or the whole model.
        refs: where weights belong; those without a weight are left out.
        weights: by layer name.
        before: what is replaced already; parts of a parameter add to it.
    """
    known = before or {}
    found = ((ref, weights[ref.layer].dequantize()) for ref in refs if ref.layer in weights)
    return assembled(found, lambda name: known.get(name, block.get_parameter(name)))


def _stored(members: list[Pair], like: Tensor) -> Tensor:
    ref, weight = members[0]
    device = weight.device if like.is_meta else like.device
    if ref.whole:
        return ref.view(weight).to(device=device, dtype=like.dtype)
    refs, weights = zip(*members, strict=True)
    if sum(w.numel() for w in weights) == like.numel():
        base = torch.empty(like.shape, dtype=like.dtype, device=device)
    else:
        base = like.detach().clone()
    made: Tensor = _Assembled.apply(base, refs, *weights)
    return made


class _Assembled(torch.autograd.Function):
    """Parts put in their places in one go; the gradient of each is a view of the whole one's.

    (In-place writes one after the other would copy the whole gradient once for every part.)
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, refs: tuple[WeightRef, ...], *weights: Tensor) -> Tensor:
        """Return the parameter; `base` is written into."""
        ctx.refs = refs
        ctx.dtypes = tuple(w.dtype for w in weights)
        ctx.mark_dirty(base)
        for ref, weight in zip(refs, weights, strict=True):
            ref.view(base).copy_(weight)
        return base

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the gradient of each weight."""
        pairs = zip(ctx.refs, ctx.dtypes, strict=True)
        return None, None, *(ref.view(grad).to(dtype) for ref, dtype in pairs)
