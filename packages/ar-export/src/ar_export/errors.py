"""Errors of ar-export."""

from __future__ import annotations

from ar_schemes import ArError


class ExportError(ArError):
    """A checkpoint that cannot be written or read."""
