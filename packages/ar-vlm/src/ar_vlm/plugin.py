"""The plugin through which ar-tuner finds the adapter."""

from __future__ import annotations

from typing import Any

from ar_tuner import hookimpl
from ar_vlm.adapter import VisionLanguageAdapter, sees, silent_blocks


@hookimpl
def ar_find_adapter(config: Any) -> VisionLanguageAdapter | None:
    """Return our adapter for a vision-language model, None for everything else."""
    if not sees(config):
        return None
    return VisionLanguageAdapter(getattr(config, "model_type", ""), silent_blocks(config))
