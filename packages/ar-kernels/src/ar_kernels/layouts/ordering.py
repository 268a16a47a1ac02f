"""Channels grouped in another order than that of the input: GPTQ's `desc_act`, CT's actorder.

A file says the group of every channel. In a `QuantizedWeight` the groups are contiguous: its codes
are sorted by group, and `extra["channel_order"]` int32 [I] holds the channel of each column.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.weight import CHANNEL_ORDER, KernelError

if TYPE_CHECKING:
    from torch import Tensor

    from ar_kernels.weight import QuantizedWeight
    from ar_schemes import TensorSpec


def groups_in_order(spec: TensorSpec, columns: int) -> Tensor:
    """Return the group of each channel when neighbours share one, int64 [I]."""
    return torch.arange(columns) // spec.granularity.region(1, columns)[1]


def order_of(index: Tensor, spec: TensorSpec, columns: int) -> Tensor | None:
    """Return the channels sorted by group, int32 [I], or None when they are in order.

    Args:
        index: int [I], the group of each channel.
        spec: of the weight.
        columns: I.

    Raises:
        KernelError: groups of unequal size.
    """
    wanted = groups_in_order(spec, columns)
    found = index.reshape(-1).cpu().long()
    if torch.equal(found, wanted):
        return None
    order = found.argsort(stable=True)
    if not torch.equal(found[order], wanted):
        count = int(wanted[-1]) + 1
        msg = (
            f"g_idx must name each of {count} groups {columns // count} times; it names groups "
            f"{int(found.min())} to {int(found.max())} unequally often"
        )
        raise KernelError(msg)
    return order.int().to(index.device)


def index_of(weight: QuantizedWeight) -> Tensor:
    """Return the group of each channel, int32 [I], as files store it."""
    columns = weight.shape[-1]
    groups = groups_in_order(weight.spec, columns).int().to(weight.codes.device)
    order = weight.extra.get(CHANNEL_ORDER)
    if order is None:
        return groups
    return torch.empty_like(groups).scatter_(0, order.long(), groups)


def sorted_by(codes: Tensor, order: Tensor | None) -> Tensor:
    """Return codes [O, I] with their columns sorted by group."""
    return codes if order is None else codes[:, order.long()].contiguous()


def natural_codes(weight: QuantizedWeight) -> Tensor:
    """Return codes [O, I] in the order of the input."""
    order = weight.extra.get(CHANNEL_ORDER)
    return weight.codes if order is None else in_natural_order(weight.codes, order)


def in_natural_order(columns: Tensor, order: Tensor) -> Tensor:
    """Return [..., I] sorted by group back in the order of the input."""
    out = torch.empty_like(columns)
    out[..., order.long()] = columns
    return out


def require_natural_order(name: str, weight: QuantizedWeight) -> None:
    """Refuse a weight whose channels a layout cannot order.

    Raises:
        KernelError: the weight groups its channels in another order than that of the input.
    """
    if CHANNEL_ORDER in weight.extra:
        msg = (
            f"{name} cannot hold channels that are grouped by activation (desc_act); "
            "gptq with g_idx can"
        )
        raise KernelError(msg)
