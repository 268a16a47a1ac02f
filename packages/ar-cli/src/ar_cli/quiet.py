"""Keep other libraries' progress bars and notes off the terminal."""

from __future__ import annotations

import os


def hush() -> None:
    """Silence transformers and the hub, unless the user has set them otherwise."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
