"""The op behind packed experts: every token times the weight of its own expert.

Which experts are used is known only when it runs, so it is opaque to graph compilers: a model with
packed experts compiles and exports in one graph, whatever backend runs inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ar_kernels.backends.base import PackedWeight
from ar_kernels.registry import backend as find_backend

if TYPE_CHECKING:
    from collections.abc import Iterator


@torch.library.custom_op("ar_kernels::expert_linear", mutates_args=())
def expert_linear(
    x: Tensor, expert: Tensor, buffers: list[Tensor], meta: list[int], backend: str, rows: int
) -> Tensor:
    """Return each of x [T, I] times the packed weight [O, I] of its expert transposed: [T, O].

    Differentiable in x.

    Args:
        x: float activations.
        expert: int64 [T], the number of each token's expert; beyond the last: zeros are returned.
        buffers: the buffers of all packed weights, expert after expert.
        meta: the integers of the packed weights, the same for all.
        backend: name of the backend that packed them.
        rows: O.

    Raises:
        KernelError: no backend has that name.
    """
    family = find_backend(backend)
    out = x.new_zeros(x.shape[0], rows)
    for packed, mine in _used(expert, buffers, meta, backend):
        out[mine] = family.linear(x[mine], packed, None).to(x.dtype)
    return out


@torch.library.custom_op("ar_kernels::expert_linear_backward", mutates_args=())
def expert_linear_backward(
    grad: Tensor, expert: Tensor, buffers: list[Tensor], meta: list[int], backend: str, columns: int
) -> Tensor:
    """Return the gradient of x [T, I] of `expert_linear`, for that of its result [T, O].

    Each weight is read back as the product with the identity, as `quant_linear` does.
    """
    family = find_backend(backend)
    eye = torch.eye(columns, dtype=grad.dtype, device=grad.device)
    out = grad.new_zeros(grad.shape[0], columns)
    for packed, mine in _used(expert, buffers, meta, backend):
        out[mine] = grad[mine] @ family.linear(eye, packed, None).to(grad.dtype).t()
    return out


def _used(
    expert: Tensor, buffers: list[Tensor], meta: list[int], backend: str
) -> Iterator[tuple[PackedWeight, Tensor]]:
    """Yield the packed weight of every expert that has tokens, and which tokens."""
    names = find_backend(backend).buffer_names(meta)
    count = len(buffers) // len(names)
    order = expert.argsort(stable=True)
    numbers, lengths = expert[order].unique_consecutive(return_counts=True)
    for number, mine in zip(numbers.tolist(), order.split(lengths.tolist()), strict=True):
        if 0 <= number < count:
            held = buffers[number * len(names) : (number + 1) * len(names)]
            yield PackedWeight(dict(zip(names, held, strict=True)), tuple(meta)), mine


@expert_linear.register_fake
def _shape(
    x: Tensor,
    expert: Tensor,  # noqa: ARG001 - the op's signature
    buffers: list[Tensor],  # noqa: ARG001
    meta: list[int],  # noqa: ARG001
    backend: str,  # noqa: ARG001
    rows: int,
) -> Tensor:
    return x.new_empty((x.shape[0], rows))


@expert_linear_backward.register_fake
def _gradient_shape(
    grad: Tensor,
    expert: Tensor,  # noqa: ARG001 - the op's signature
    buffers: list[Tensor],  # noqa: ARG001
    meta: list[int],  # noqa: ARG001
    backend: str,  # noqa: ARG001
    columns: int,
) -> Tensor:
    return grad.new_empty((grad.shape[0], columns))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, expert, buffers, ctx.meta, ctx.backend, _ = inputs
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(expert, *buffers)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradient of x; the packed weights have none."""
    expert, *buffers = ctx.saved_tensors
    rest = (expert, buffers, ctx.meta, ctx.backend, ctx.columns)
    # torch 2.13 takes an empty list of integers for an empty list of tensors and wants one back
    no_meta: list[None] | None = None if ctx.meta else []
    to_x = expert_linear_backward(grad.contiguous(), *rest)
    return to_x, None, [None] * len(buffers), no_meta, None, None


expert_linear.register_autograd(_backward, setup_context=_save)
