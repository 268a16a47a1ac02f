"""Carry a block's arguments to the device it computes on, and its results back."""

from __future__ import annotations

import copy
from collections import UserDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Route:
    """Where a block computes (`there`) and where its caller is (`back`); None: no move."""

    there: torch.device | None = None
    back: torch.device | None = None

    def run(
        self, block: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> object:
        """Return what the block gives, on the caller's device.

        What the block writes into dicts and lists among its arguments (states that blocks share)
        is written into the caller's own.
        """
        copies: list[_Copy] = []
        args, kwargs = _moved((args, kwargs), to(self.there), copies)
        output = block(*args, **kwargs)
        for made in copies:
            made.write_back(to(self.back))
        return moved(output, to(self.back))


def to(device: torch.device | None) -> Move:
    """Return the function that moves a tensor to a device; None: leaves it where it is."""
    return (lambda tensor: tensor) if device is None else (lambda tensor: tensor.to(device))


def moved(tree: Any, move: Move) -> Any:
    """Return a tree of containers with every tensor in it moved.

    Containers are new where a tensor in them moved; a tree in which none did is returned itself.
    """
    return _moved(tree, move, [])


@dataclass(frozen=True)
class _Copy:
    """A container that was copied because its tensors moved."""

    original: Any
    made: Any
    before: Any

    def write_back(self, move: Move) -> None:
        """Put what has changed in the copy since into the original."""
        if isinstance(self.original, list):
            if len(self.made) == len(self.before) and all(map(_is, self.made, self.before)):
                return
            olds = self.original
            self.original[:] = [
                olds[i] if i < len(self.before) and item is self.before[i] else moved(item, move)
                for i, item in enumerate(self.made)
            ]
            return
        for key in self.before.keys() - self.made.keys():
            del self.original[key]
        for key, item in self.made.items():
            if key not in self.before or item is not self.before[key]:
                self.original[key] = moved(item, move)


def _is(a: object, b: object) -> bool:
    return a is b


def _moved(tree: Any, move: Move, copies: list[_Copy]) -> Any:
    if isinstance(tree, Tensor):
        return move(tree)
    if isinstance(tree, (tuple, list)):
        items = [_moved(item, move, copies) for item in tree]
        if all(map(_is, items, tree)):
            return tree
        if isinstance(tree, list):
            copies.append(_Copy(tree, items, list(items)))
            return items
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, (dict, UserDict)):
        found = {key: _moved(item, move, copies) for key, item in tree.items()}
        if all(item is tree[key] for key, item in found.items()):
            return tree
        made = copy.copy(tree)
        for key, item in found.items():
            made[key] = item
        copies.append(_Copy(tree, made, dict(found)))
        return made
    return tree
