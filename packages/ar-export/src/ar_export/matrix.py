"""Which format carries which scheme: asked of the formats themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_export.formats.base import HoldsEmbeddings
from ar_export.registry import formats
from ar_kernels import data_types
from ar_schemes import schemes

if TYPE_CHECKING:
    from ar_export.formats.base import Format
    from ar_schemes import Scheme

SAMPLE = (512, 512)
"""Shape of the layer that is asked about; every preset divides it."""


def support_matrix() -> dict[str, dict[str, str | None]]:
    """Return, by scheme and format, None where it is carried, else the reason why not."""
    return {
        one.name: {found.name: reason(found, one) for found in formats().values()}
        for one in schemes().values()
        if one.weight is not None
    }


def reason(found: Format, one: Scheme) -> str | None:
    """Return why no spelling of a format carries a scheme, or None."""
    every = [one, *(schemes()[name] for name in one.roles.values())]
    known = data_types()
    for part in every:
        for spec in (part.weight, part.activation):
            if spec is not None and spec.data_type not in known:
                return f"no installed package computes {spec.data_type}"
    if "embedding" in one.roles and not isinstance(found, HoldsEmbeddings):
        return f"{found.name} cannot hold a quantized embedding"
    whys = [_first(found, spelling, every) for spelling in found.spellings]
    return None if None in whys else whys[0]


def _first(found: Format, spelling: str, every: list[Scheme]) -> str | None:
    """Return the first reason against one of the schemes that make up a mixed one."""
    reasons = (found.refuses(spelling, part, *SAMPLE) for part in every)
    return next((why for why in reasons if why is not None), None)
