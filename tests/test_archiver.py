"""Our `ar` first on PATH does not break a build that needs the archiver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ar_cli.archiver import is_archiver_call
from ar_cli.registry import commands

if TYPE_CHECKING:
    from pathlib import Path

WRAPPER = """#!{python}
import sys
sys.path[:0] = {path!r}
from ar_cli.entry import main
sys.exit(main())
"""


@pytest.fixture
def our_bin(tmp_path: Path) -> Path:
    """A folder that holds our `ar`, as a virtual environment's would."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "ar"
    path = [p for p in sys.path if p]
    script.write_text(WRAPPER.format(python=sys.executable, path=path))
    script.chmod(0o755)
    return folder


def run(our_bin: Path, *args: str, path: str | None = None, cwd: Path | None = None):
    rest = os.environ["PATH"] if path is None else path
    return subprocess.run(
        [str(our_bin / "ar"), *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PATH": f"{our_bin}{os.pathsep}{rest}"},
    )


@pytest.mark.parametrize("name", list(commands()))
def test_no_command_has_the_form_of_an_archivers_call(name: str) -> None:
    assert not is_archiver_call([name])


@pytest.mark.parametrize(
    "args",
    [
        *(["rcs", "x.a"], ["-t"], ["qc"], ["@file"], ["-V"], ["--target=elf"]),
        *(["cr", "x.a"], ["cru", "x.a"], ["-crs", "x.a"], ["-c", "-r", "x.a"], ["s", "x.a"]),
    ],
    ids=" ".join,
)
def test_an_archivers_call_is_recognised(args: list[str]) -> None:
    assert is_archiver_call(args)


@pytest.mark.parametrize(
    "args",
    [[], ["-h"], ["--help"], ["--version"], ["quantize"], ["plan"], ["formats"], ["-v"], ["-c"]],
)
def test_ours_is_not_an_archivers_call(args: list[str]) -> None:
    assert not is_archiver_call(args)


def test_without_an_archiver_the_status_is_127(our_bin, tmp_path) -> None:
    done = run(our_bin, "rcs", "x.a", path=str(tmp_path / "nothing"))
    assert done.returncode == 127
    assert "no archiver is on PATH" in done.stderr


def test_another_folder_with_our_own_script_is_passed_over(our_bin, tmp_path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(our_bin, twin)
    done = run(our_bin, "rcs", "x.a", path=str(twin))
    assert done.returncode == 127


def test_a_shim_that_leads_back_to_us_ends(our_bin, tmp_path) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    hidden = tmp_path / "hidden"  # the shim names our script by a variable, as pyenv's does
    shim = shims / "ar"
    shim.write_text('#!/bin/sh\nexec "$HIDDEN" "$@"\n')
    shim.chmod(0o755)
    our_bin.rename(hidden)
    done = subprocess.run(
        [str(hidden / "ar"), "t", "x.a"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
        env={**os.environ, "PATH": str(shims), "HIDDEN": str(hidden / "ar")},
    )
    assert done.returncode == 127
    assert "no archiver is on PATH" in done.stderr


@pytest.mark.skipif(
    not all(map(shutil.which, ("gcc", "make", "ar"))), reason="needs gcc, make and ar"
)
def test_make_builds_a_static_library_with_our_folder_first(our_bin, tmp_path) -> None:
    (tmp_path / "x.c").write_text("int answer(void) { return 42; }\n")
    (tmp_path / "Makefile").write_text("AR = ar\nlibx.a: x.o\n\t$(AR) rcs $@ $<\n")
    environment = {**os.environ, "PATH": f"{our_bin}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["make"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    listing = run(our_bin, "t", "libx.a", cwd=tmp_path)
    assert listing.stdout.split() == ["x.o"]


def test_our_own_calls_stay_ours(our_bin) -> None:
    done = run(our_bin, "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("ar, version")
