"""Would vLLM and SGLang open a checkpoint? Asked of its config and headers, without an engine.

Warnings are mistakes that another config would not have; notes say which engine has no way to run
such a scheme in such a format at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_export.lint.engines import notes
from ar_export.lint.keys import keys
from ar_export.lint.layers import layers
from ar_export.lint.skips import METHODS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ar_export.findings import Finding
    from ar_export.formats.base import Readable

__all__ = ["lint"]


def lint(found: Readable) -> Iterator[Finding]:
    """Yield what vLLM and SGLang would stumble over; nothing for files that describe themselves."""
    method = (found.quantization_config or {}).get("quant_method")
    if method not in METHODS:  # neither engine opens it, whatever it says
        return
    yield from layers(found)
    yield from keys(found)
    yield from notes(found)
