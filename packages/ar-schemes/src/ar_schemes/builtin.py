"""The first-party schemes, entering through the same hook as a third party's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_schemes.hookspecs import hookimpl
from ar_schemes.presets import builtin_schemes

if TYPE_CHECKING:
    from ar_schemes.scheme import Scheme


@hookimpl
def ar_register_schemes() -> list[Scheme]:
    """Return the preset table."""
    return builtin_schemes()
