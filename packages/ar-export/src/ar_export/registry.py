"""Look up formats by name."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ar_export import builtin, hookspecs
from ar_export.errors import ExportError
from ar_export.formats.base import Format
from ar_schemes import PluginHost, Registry, unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping


@functools.cache
def host() -> PluginHost:
    """Return the process's host of ar-export, made on first use."""
    return PluginHost("ar_export", hookspecs, builtins={"builtin": builtin})


@functools.cache
def _formats() -> Registry[Format]:
    return Registry(host(), "ar_register_formats", kind=Format, name_of=lambda item: item.name)


def formats() -> Mapping[str, Format]:
    """Return every format, plugins' included."""
    return _formats().all()


def format(spelling: str) -> Format:  # noqa: A001 - the noun of the package
    """Return the format that a spelling (`auto_round`, `auto_round:gptqmodel`) belongs to.

    Raises:
        ExportError: no installed format goes by it.
    """
    for found in formats().values():
        if spelling in found.spellings:
            return found
    known = [s for f in formats().values() for s in f.spellings]
    raise ExportError(unknown_name("format", spelling, known))
