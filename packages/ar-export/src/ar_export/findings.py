"""What a check of a checkpoint reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing about a checkpoint, and where.

    Attributes:
        level: `error` (it is wrong), `warning` (an engine would refuse or misread it) or `note`
            (an engine has no way to run this scheme, however it is written).
        what: the sentence.
        where: layer, tensor or file; empty: the whole checkpoint.
    """

    level: Literal["error", "warning", "note"]
    what: str
    where: str
