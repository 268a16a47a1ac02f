"""Hooks that ar-cli calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable

    import click

hookspec = pluggy.HookspecMarker("ar_cli")
hookimpl = pluggy.HookimplMarker("ar_cli")


@hookspec
def ar_register_commands() -> Iterable[click.Command]:  # type: ignore[empty-body]
    """Return commands of `ar`; names in the form of an archiver's call (`tv`) are refused."""
