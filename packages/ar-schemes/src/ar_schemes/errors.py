"""The errors every ar package raises: one base class, one subclass per kind of mistake."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class ArError(Exception):
    """A mistake that a person can mend: the message says what, where, what is allowed."""


class SchemeError(ArError):
    """A scheme, a layer rule or a plan that cannot be."""


class PluginError(ArError):
    """A plugin that cannot be used as asked."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, hint: str = "") -> str:
    """Return the message for a name that is not in a table: the nearest names first, then all."""
    names = sorted(known)
    folded = {n.casefold(): n for n in names}
    near = [folded[n] for n in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
    guess = f" Did you mean {', '.join(near)}?" if near else ""
    tail = f" {hint}" if hint else ""
    return f"unknown {kind} {name!r}.{guess} Known: {', '.join(names) or 'none'}.{tail}"
