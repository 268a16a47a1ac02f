"""What the sweep is expected to find: `expected.toml`, and how records are held against it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE = Path(__file__).with_name("expected.toml")


def expected() -> dict[str, dict[str, str]]:
    """Return the types that are known to fail: the step, and the reason."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def surprise(record: Mapping[str, Any], known: Mapping[str, Mapping[str, str]]) -> str | None:
    """Return what a record has that was not expected, or None."""
    kind, failed = record["model_type"], record["failed"]
    listed = known.get(kind)
    if listed is None:
        if failed is None:
            return None
        return f"{kind}: fails at {failed}: {record['error']} ({record['place']})"
    if failed is None:
        return f"{kind}: passes every step; remove it from {FILE.name}"
    if failed != listed["step"]:
        return f"{kind}: fails at {failed}, not at {listed['step']}: {record['error']}"
    return None


def surprises(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what all records have that was not expected."""
    known = expected()
    found = [surprise(record, known) for record in records.values()]
    return [text for text in found if text is not None]
