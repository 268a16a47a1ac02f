"""Fixtures of the tests that cross packages: the demo model, a command line in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ar_cli

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
DEMO = Path(ar_cli.__file__).parent / "demo" / "model"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return DEMO


@pytest.fixture
def ar(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `ar ARGS` in a process of its own."""

    def run(*args: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ar_cli", *map(str, args)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=timeout,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )

    return run
