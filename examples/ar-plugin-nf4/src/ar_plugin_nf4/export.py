"""What ar-export gains: the format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_export import hookimpl
from ar_plugin_nf4.format import Nf4Format

if TYPE_CHECKING:
    from ar_export import Format


@hookimpl
def ar_register_formats() -> list[Format]:
    """Return the format `nf4`."""
    return [Nf4Format()]
