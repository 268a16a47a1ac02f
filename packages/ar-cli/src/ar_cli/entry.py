"""Console script: the archiver gets its calls, everything else is ours."""

from __future__ import annotations

import sys
from pathlib import Path

from ar_cli.archiver import is_archiver_call, step_aside


def main() -> int:
    """Run `ar` and return its exit status."""
    args = sys.argv[1:]
    if is_archiver_call(args):
        return step_aside(args, Path(sys.argv[0]))
    from ar_cli.main import run

    return run(args)
