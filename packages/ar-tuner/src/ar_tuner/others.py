"""Samples that hold more than a row of token ids: the model's inputs, one sample at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

Item = TypeVar("Item")
Inputs: TypeAlias = "Mapping[str, Tensor]"
"""Keyword arguments of a model's forward; token ids are [B, T]."""


def samples_of(inputs: Mapping[str, Any]) -> int:
    """Return how many samples inputs hold."""
    ids = inputs.get("input_ids")
    first = ids if isinstance(ids, torch.Tensor) else next(iter(inputs.values()))
    return int(first.shape[0])


def joined(parts: Sequence[Inputs], *, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield inputs of equal keys, shapes and types as batches of at most `size` samples."""
    groups: dict[tuple[Any, ...], list[Inputs]] = {}
    for part in parts:
        shape = tuple((k, tuple(v.shape), v.dtype) for k, v in sorted(part.items()))
        groups.setdefault(shape, []).append(part)
    for group in groups.values():
        for start in range(0, len(group), size):
            some = group[start : start + size]
            yield {k: torch.cat([part[k] for part in some]) for k in some[0]}


def fitted(
    samples: Sequence[Inputs], model: nn.Module, device: torch.device | None
) -> tuple[Inputs, ...]:
    """Return samples for a model: floats in its type, everything on a device."""
    kind = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def made(value: Tensor) -> Tensor:
        return value.to(device, kind if value.is_floating_point() else value.dtype)

    return tuple({name: made(value) for name, value in sample.items()} for sample in samples)


def interleaved(first: Sequence[Item], second: Sequence[Item]) -> list[Item]:
    """Return two lists as one in which each is spread evenly."""
    places = [((i + 0.5) / len(first), 0, i) for i in range(len(first))]
    places += [((i + 0.5) / len(second), 1, i) for i in range(len(second))]
    return [(second if which else first)[i] for _, which, i in sorted(places)]
