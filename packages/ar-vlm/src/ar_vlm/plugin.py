"""The plugin through which ar-tuner finds the adapter."""

from __future__ import annotations

from typing import Any

from ar_tuner import hookimpl
from ar_vlm.adapter import TextDecoderAdapter, sees, silent_blocks


@hookimpl
def ar_find_adapter(config: Any) -> TextDecoderAdapter | None:
    """Return our adapter for a vision-language model, None for everything else."""
    return TextDecoderAdapter(silent_blocks(config)) if sees(config) else None
