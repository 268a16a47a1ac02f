"""What prepared calls rely on, looked at before each token: modules and tensors in their places.

A model has hundreds of them, so they are compared in loops that run in C: 30 ns each where a line
of Python for each takes ten times that.
"""

from __future__ import annotations

from itertools import repeat
from operator import contains, is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    Found = tuple[dict[str, Any], str, Any]
    # a table of a module, a name in it, and what was found there

_HOOKS = itemgetter("_forward_hooks")
_PRE_HOOKS = itemgetter("_forward_pre_hooks")


class Watched:
    """Objects in tables of modules, compared by identity."""

    def __init__(self, found: Iterable[Found]) -> None:
        """Watch what was found."""
        self.found: tuple[Found, ...] = tuple(found)
        self._tables = [table for table, _, _ in self.found]
        self._names = [name for _, name, _ in self.found]
        self._objects = [one for _, _, one in self.found]

    def is_same(self) -> bool:
        """Tell whether the same objects are there."""
        return all(map(is_, map(dict.get, self._tables, self._names), self._objects))


class WatchedModules(Watched):
    """Modules in their parents' tables: none replaced, hooked into or given another `forward`."""

    def __init__(self, found: Iterable[Found]) -> None:
        """Watch what was found."""
        super().__init__(found)
        self._own = [vars(one) for one in self._objects]

    def is_same(self) -> bool:
        """Tell whether the same modules are there and do what their classes say."""
        own = self._own
        return (
            super().is_same()
            and not any(map(contains, own, repeat("forward")))
            and not any(map(_HOOKS, own))
            and not any(map(_PRE_HOOKS, own))
        )


class WatchedParameters:
    """Parameters of modules, by where their values lie in memory."""

    def __init__(self, modules: Sequence[tuple[nn.Module, str]]) -> None:
        """Watch parameters that are there: each a module and a name in it."""
        self.modules = tuple(modules)
        self._tables = [vars(module)["_parameters"] for module, _ in self.modules]
        self._names = [name for _, name in self.modules]
        self._places = self._now()

    def _now(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, map(dict.__getitem__, self._tables, self._names)))

    def is_same(self) -> bool:
        """Tell whether all values lie where they lay."""
        return self._now() == self._places
