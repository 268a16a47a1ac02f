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

TRIED = "AR_CLI_TRIED"
"""Environment variable: folders whose `ar` was asked already. A shim (pyenv's, asdf's) may lead
back to this program; without it the two would call each other for ever."""
_LETTERS = re.compile(r"[abcDdfilmMNoOpPqrsStTuUvVx]+")
_OPERATIONS = frozenset("dmpqrtx")
_LONG = re.compile(r"--(target|plugin|output|thin|record-libdeps)(=.*)?")
_NOT_FOUND = 127


def is_archiver_call(args: Sequence[str]) -> bool:
    """Tell whether arguments are in the archiver's grammar, none of ours."""
    if not args:
        return False
    first = args[0]
    if first.startswith("@") or first in ("-V", "-M") or _LONG.fullmatch(first):
        return True
    if not first.startswith("-"):
        return _is_key(first)
    letters = ""
    for word in args:  # `-c -r lib.a`: the letters may come one by one
        if not word.startswith("-") or not _LETTERS.fullmatch(word[1:]):
            break
        letters += word[1:]
    return _is_key(letters)


def _is_key(word: str) -> bool:
    """Tell whether a word is an operation with modifiers, in any order: `rcs`, `cru`, `t`, `s`.

    Exactly one operation letter (or `s` alone, the index), so that words of ours such as
    `formats`, which the archiver's letters spell too, stay ours.
    """
    if not _LETTERS.fullmatch(word):
        return False
    operations = sum(letter in _OPERATIONS for letter in word)
    return operations == 1 or (operations == 0 and "s" in word)


def find_archiver(env: Mapping[str, str], own: Path) -> str | None:
    """Return the next `ar` on PATH outside our own folder, or None."""
    mine = {own.parent.absolute(), own.resolve().parent}
    mine |= {Path(entry) for entry in env.get(TRIED, "").split(os.pathsep) if entry}
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
    tried = [entry for entry in os.environ.get(TRIED, "").split(os.pathsep) if entry]
    tried.append(str(Path(found).parent.absolute()))
    env = {**os.environ, TRIED: os.pathsep.join(tried)}
    return os.execve(found, [found, *args], env)  # noqa: S606 - the same call, another program


def _is_ours(path: Path) -> bool:
    """Tell whether a script is an `ar` of another environment of ours."""
    with path.open("rb") as file:
        return b"ar_cli" in file.read(2048)
