"""What goes wrong here."""

from __future__ import annotations

from ar_schemes import ArError


class VlmError(ArError):
    """A vision-language model or its calibration data that cannot be treated as asked."""
