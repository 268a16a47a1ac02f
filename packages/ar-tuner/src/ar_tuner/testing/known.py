"""Known failures in a file, and how records are held against it.

    [gemma3n]
    step = "build"
    reason = "its eyes need timm"
    unless = "timm"

A family that fails and is not listed is a finding; so is one that is listed and passes, or fails
elsewhere: the file then says what is no longer so. `unless` names a package: where it is installed
the entry does not hold, and the family has to pass.
"""

from __future__ import annotations

import importlib.util
import tomllib
from typing import TYPE_CHECKING, Any

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    Known = Mapping[str, Mapping[str, str]]


def read_known(path: Path) -> Known:
    """Return the families that are known to fail, each with `step` and `reason`.

    Raises:
        TunerError: an entry lacks one of them.
    """
    known = tomllib.loads(path.read_text(encoding="utf-8"))
    bad = [kind for kind, entry in known.items() if {"step", "reason"} - set(entry)]
    if bad:
        msg = f"{path}: {', '.join(bad)} must have a step and a reason"
        raise TunerError(msg)
    return known


def surprise(record: Mapping[str, Any], known: Known) -> str | None:
    """Return what a record (see `Record.to_dict`) has that was not known, or None."""
    kind, failed = record["model_type"], record["failed"]
    listed = known.get(kind)
    if listed is not None and not _holds(listed):
        listed = None
    if listed is None:
        if failed is None:
            return None
        return f"{kind}: fails at {failed}: {record['error']} ({record['place']})"
    if failed is None:
        return f"{kind}: passes every step: remove it from the known failures"
    if failed != listed["step"]:
        return f"{kind}: fails at {failed}, not at {listed['step']}: {record['error']}"
    return None


def _holds(entry: Mapping[str, str]) -> bool:
    needed = entry.get("unless")
    return needed is None or importlib.util.find_spec(needed) is None
