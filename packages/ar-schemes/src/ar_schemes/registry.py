"""Look up schemes by name: presets and those of plugins."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ar_schemes import builtin, hookspecs
from ar_schemes.errors import SchemeError, unknown_name
from ar_schemes.plugins import PluginHost, Registry
from ar_schemes.scheme import Scheme, scheme_from_dict

if TYPE_CHECKING:
    from collections.abc import Mapping


@functools.cache
def host() -> PluginHost:
    """Return the process's host of ar-schemes, made on first use."""
    return PluginHost("ar_schemes", hookspecs, builtins={"builtin": builtin})


@functools.cache
def _registry() -> Registry[Scheme]:
    return Registry(host(), "ar_register_schemes", kind=Scheme, name_of=lambda s: s.name)


def schemes() -> dict[str, Scheme]:
    """Return every named scheme, plugins' included."""
    return _registry().all()


def scheme(which: str | Scheme | Mapping[str, object]) -> Scheme:
    """Return a scheme by preset name (any case), from its flat form, or as given.

    Raises:
        SchemeError: unknown name (the nearest are listed), unknown key, value out of range.
    """
    if isinstance(which, Scheme):
        return which
    if not isinstance(which, str):
        return scheme_from_dict(which)
    found = _registry().find(which)
    if found is None:
        broken = host().failures
        hint = f"{len(broken)} plugins failed to load: see `ar plugins`." if broken else ""
        raise SchemeError(unknown_name("scheme", which, schemes(), hint=hint))
    return found
