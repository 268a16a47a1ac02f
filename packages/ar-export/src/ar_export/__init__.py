"""From quantized weights to files and back: formats, streaming writer, reader, verify."""

from ar_export.compare import Comparison, compare_checkpoints
from ar_export.convert import convert
from ar_export.errors import ExportError
from ar_export.findings import Finding
from ar_export.formats.base import Container, Format, LayerEntry, Readable
from ar_export.hookspecs import hookimpl
from ar_export.lint import lint
from ar_export.opening import open_dequantized, open_model
from ar_export.reader import Checkpoint, open_checkpoint
from ar_export.registry import format, formats, host  # noqa: A004 - the noun of the package
from ar_export.verify import VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "Comparison",
    "Container",
    "ExportError",
    "Finding",
    "Format",
    "LayerEntry",
    "Readable",
    "VerifyReport",
    "compare_checkpoints",
    "convert",
    "format",
    "formats",
    "hookimpl",
    "host",
    "lint",
    "open_checkpoint",
    "open_dequantized",
    "open_model",
    "verify",
]
