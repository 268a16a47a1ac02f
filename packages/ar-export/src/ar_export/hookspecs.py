"""Hooks that ar-export calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ar_export.formats.base import Format

hookspec = pluggy.HookspecMarker("ar_export")
hookimpl = pluggy.HookimplMarker("ar_export")


@hookspec
def ar_register_formats() -> Iterable[Format]:  # type: ignore[empty-body]
    """Return checkpoint formats: what they can carry, how they are written and read."""
