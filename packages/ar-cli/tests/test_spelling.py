"""Commands that are printed start this program, not the system's archiver."""

from __future__ import annotations

import shlex
import sys

from ar_cli.spelling import program


def test_on_path_it_is_one_word(tmp_path, monkeypatch) -> None:
    script = tmp_path / "ar"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program(str(script)) == "ar"


def test_beside_path_it_is_what_was_called(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    assert program(".venv/bin/ar") == ".venv/bin/ar"
    assert program("my venv/bin/ar-cli") == "'my venv/bin/ar-cli'"


def test_as_a_module_it_names_the_interpreter() -> None:
    assert program("/somewhere/ar_cli/__main__.py") == f"{shlex.quote(sys.executable)} -m ar_cli"
