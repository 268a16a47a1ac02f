"""Float types that configs name."""

from __future__ import annotations

from typing import Any

import torch


def config_dtype(config: Any) -> torch.dtype:
    """Return the float type a config names, float32 where it names none."""
    text = config.get("text_config") or {}
    name = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def names_dtype(config: Any) -> bool:
    """Tell whether a config names a float type."""
    text = config.get("text_config") or {}
    return any(d.get(key) for d in (config, text) for key in ("dtype", "torch_dtype"))
