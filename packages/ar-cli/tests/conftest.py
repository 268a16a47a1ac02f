"""Commands through click's runner, and a checkpoint to run them on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

import ar_cli
from ar_cli.main import cli

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def ar() -> Callable[..., Result]:
    """Run a command and return what click's runner saw of it."""

    def run(*args: object) -> Result:
        return CliRunner().invoke(cli, [str(a) for a in args])

    return run


@pytest.fixture(scope="session")
def rtn(ar, tmp_path_factory) -> Path:
    """The embedded model, rounded to nearest."""
    out = tmp_path_factory.mktemp("rtn") / "out"
    demo = Path(ar_cli.__file__).parent / "demo" / "model"
    done = ar("quantize", demo, "--recipe", "rtn", "-o", out)
    assert done.exit_code == 0, done.output
    assert "verified" in done.output
    return out
