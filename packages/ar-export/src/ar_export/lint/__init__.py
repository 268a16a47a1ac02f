"""Would vLLM and SGLang open a checkpoint? Asked of its config and headers, without an engine.

Warnings are mistakes that another config would not have; notes say which engine has no way to run
such a scheme in such a format at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_export.errors import ExportError
from ar_export.findings import Finding
from ar_export.formats.packed import config_errors
from ar_export.lint.engines import notes
from ar_export.lint.keys import keys
from ar_export.lint.layers import layers
from ar_export.lint.skips import METHODS

if TYPE_CHECKING:
    from ar_export.formats.base import Readable

__all__ = ["lint"]


def lint(found: Readable) -> tuple[Finding, ...]:
    """Return what vLLM and SGLang would stumble over; nothing for what neither of them opens."""
    method = (found.quantization_config or {}).get("quant_method")
    if method not in METHODS:
        return ()
    try:
        with config_errors():
            return (*layers(found), *keys(found), *notes(found))
    except ExportError as error:  # keys of layers that are not quantized are first read here
        return (Finding("error", str(error), "quantization_config"),)
