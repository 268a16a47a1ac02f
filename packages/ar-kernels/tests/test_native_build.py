"""Building the module that calls the compiled library: what is missing is said by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ar_kernels.native import build

if TYPE_CHECKING:
    from pathlib import Path


def test_the_headers_of_python_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "compiler", lambda: "c++")
    monkeypatch.setattr(build.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no .*Python\.h: install the headers of Python"):
        build.build_quick_call(tmp_path / "made.so")
    assert not list(tmp_path.iterdir())


def test_a_compiler_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiler", lambda: None)
    for make in (build.build, build.build_quick_call):
        with pytest.raises(build.BuildError, match=r"no C\+\+ compiler: set CXX"):
            make(tmp_path / "made.so")
    assert not list(tmp_path.iterdir())


def test_what_the_compiler_says_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = build.compiler()
    if found is None:
        pytest.skip("no compiler")
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / "Python.h").write_text("#error these are no headers\n")
    (tmp_path / "made").mkdir()
    monkeypatch.setattr(build.sysconfig, "get_path", lambda _: str(tmp_path / "headers"))
    with pytest.raises(build.BuildError, match="these are no headers"):
        build.build_quick_call(tmp_path / "made" / "made.so")
    assert not list((tmp_path / "made").iterdir())
