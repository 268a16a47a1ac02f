"""Step aside for the system's archiver, which is called `ar` too. Standard library only.

A build tool that finds our `ar` first on PATH and calls it in the archiver's grammar
(`ar rcs libx.a x.o`) gets the archiver.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_OPERATION = re.compile(r"-?[dmpqrstx][abcDfilNoOPsSTuUvV]*")
_LONG = re.compile(r"--(target|plugin|output|thin|record-libdeps)(=.*)?")
_NOT_FOUND = 127


def is_archiver_call(args: Sequence[str]) -> bool:
    """Tell whether arguments are in the archiver's grammar, none of ours."""
    if not args:
        return False
    first = args[0]
    return (
        first.startswith("@")
        or first in ("-V", "-M")
        or _OPERATION.fullmatch(first) is not None
        or _LONG.fullmatch(first) is not None
    )


def find_archiver(env: Mapping[str, str], own: Path) -> str | None:
    """Return the next `ar` on PATH outside our own folder, or None."""
    mine = {own.parent.absolute(), own.resolve().parent}
    for folder in env.get("PATH", os.defpath).split(os.pathsep):
        if not folder or Path(folder).absolute() in mine or Path(folder).resolve() in mine:
            continue
        for name in ("ar", "llvm-ar", "gcc-ar"):
            candidate = Path(folder) / name
            if not candidate.is_file() or not os.access(candidate, os.X_OK):
                continue
            if not _is_ours(candidate):
                return str(candidate)
    return None


def step_aside(args: Sequence[str], own: Path) -> int:
    """Become the archiver; returns only, with the exit status, when there is none."""
    found = find_archiver(os.environ, own)
    if found is None:
        sys.stderr.write(
            f"ar: {args[0]!r} is an archiver's call, but no archiver is on PATH. "
            "This `ar` is the quantization toolkit; see `ar --help`.\n"
        )
        return _NOT_FOUND
    return os.execv(found, [found, *args])  # noqa: S606 - the same call, another program


def _is_ours(path: Path) -> bool:
    """Tell whether a script is an `ar` of another environment of ours."""
    with path.open("rb") as file:
        return b"ar_cli" in file.read(2048)
