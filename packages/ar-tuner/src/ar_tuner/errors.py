"""Errors of ar-tuner."""

from __future__ import annotations

from ar_schemes import ArError


class TunerError(ArError):
    """A quantization that was asked for cannot be done, or not so."""
