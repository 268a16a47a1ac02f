"""The plugin through which ar-tuner finds the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_tuner import hookimpl
from ar_vlm.adapter import VisionLanguageAdapter, sees, silent_blocks
from ar_vlm.samples.hub import SETS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ar_tuner.calibration import DatasetSource


@hookimpl
def ar_find_adapter(config: Any) -> VisionLanguageAdapter | None:
    """Return our adapter for a vision-language model, None for everything else."""
    if not sees(config):
        return None
    return VisionLanguageAdapter(getattr(config, "model_type", ""), silent_blocks(config))


@hookimpl
def ar_register_datasets() -> Iterable[DatasetSource]:
    """Return the sets with images that auto-round knows by name."""
    return SETS
