"""How the user calls this program, for commands that are printed to be typed."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def program(argument: str | None = None) -> str:
    """Return the words that start this program.

    `ar` when that is what PATH finds; otherwise as it was called, since a bare `ar` would be the
    system's archiver.

    Args:
        argument: `sys.argv[0]`, for tests.
    """
    called = Path(sys.argv[0] if argument is None else argument)
    if called.name not in ("ar", "ar-cli"):
        return f"{shlex.quote(sys.executable)} -m ar_cli"
    found = shutil.which(called.name)
    if found is not None and Path(found).resolve() == called.resolve():
        return called.name
    return shlex.quote(str(called))
