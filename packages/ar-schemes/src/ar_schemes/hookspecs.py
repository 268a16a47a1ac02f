"""Hooks that ar-schemes calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ar_schemes.scheme import Scheme

hookspec = pluggy.HookspecMarker("ar_schemes")
hookimpl = pluggy.HookimplMarker("ar_schemes")


@hookspec
def ar_register_schemes() -> Iterable[Scheme]:  # type: ignore[empty-body]
    """Return named schemes (presets). Called once, when a name is looked up or a list is asked for.

    A name that a built-in scheme or an earlier plugin holds is refused.
    """
