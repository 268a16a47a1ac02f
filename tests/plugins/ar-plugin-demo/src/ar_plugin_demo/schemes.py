"""A scheme: six bits in groups of 32, under a name of its own."""

from __future__ import annotations

from ar_schemes import Scheme, hookimpl, scheme


@hookimpl
def ar_register_schemes() -> list[Scheme]:
    """Return the scheme."""
    six = scheme("W6A16").with_overrides({"group_size": 32})
    return [Scheme(name="DEMO6", weight=six.weight)]
