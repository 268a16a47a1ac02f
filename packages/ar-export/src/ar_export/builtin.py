"""The first-party formats, entering through the hook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_export.formats.auto_awq import AutoAwqFormat
from ar_export.formats.auto_gptq import AutoGptqFormat
from ar_export.formats.auto_round import AutoRoundFormat
from ar_export.formats.fake import FakeFormat
from ar_export.formats.fp8 import Fp8Format
from ar_export.formats.gguf import GgufFormat
from ar_export.formats.llm_compressor import LlmCompressorFormat
from ar_export.formats.mlx import MlxFormat
from ar_export.hookspecs import hookimpl

if TYPE_CHECKING:
    from ar_export.formats.base import Format


@hookimpl
def ar_register_formats() -> list[Format]:
    """Return the built-in formats."""
    return [
        *(AutoRoundFormat(), AutoGptqFormat(), AutoAwqFormat()),
        *(LlmCompressorFormat(), Fp8Format(), GgufFormat(), MlxFormat(), FakeFormat()),
    ]
