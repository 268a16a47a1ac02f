"""The checks. `nox` alone runs lint, types and tests in the current environment."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = True

PACKAGES = ("ar-schemes", "ar-kernels", "ar-tuner", "ar-export", "ar-vlm", "ar-cli")
SOURCES = ("packages", "tests", "scripts", "benchmarks", "noxfile.py")
PINS = ("-c", "constraints.txt")
NOT_WITH = {"ar-schemes": ("torch", "transformers"), "ar-kernels": ("transformers",)}
"""What must not be importable where only the package and its closure are installed."""


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Style: ruff check, ruff format, and every package's changelog."""
    session.run(sys.executable, "-m", "ruff", "check", *SOURCES)
    session.run(sys.executable, "-m", "ruff", "format", "--check", *SOURCES)
    session.run(sys.executable, "scripts/check_changelogs.py")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Types: mypy, strict, over all six packages in one run."""
    session.run(sys.executable, "-m", "mypy")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The whole test suite in the current environment (pytest arguments after --).

    Two processes of one thread each: 4,500 small tests gain nothing from threads within one.
    Random inputs are the same each time; `fuzz` looks for others.
    """
    session.run(
        *(sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "not network"),
        *("--hypothesis-profile", "ci", *session.posargs),
        env={"OMP_NUM_THREADS": "1"},
    )


@nox.session(venv_backend="none")
def fuzz(session: nox.Session) -> None:
    """Tests of random inputs with other inputs each time (a number of rounds after --, else 10)."""
    for _ in range(int(session.posargs[0]) if session.posargs else 10):
        session.run(
            *(sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "hypothesis"),
            *("--hypothesis-seed", "random"),
            env={"OMP_NUM_THREADS": "1"},
        )


@nox.session(venv_backend="none")
def sweep(session: nox.Session) -> None:
    """Every type of language model that Transformers has, through every step (half an hour)."""
    arguments = session.posargs or ["--jobs", "2", "--again"]
    session.run(sys.executable, "tests/sweep/run.py", *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """The documents: generated parts are current, links lead somewhere, commands agree."""
    session.run(sys.executable, "scripts/generate_docs.py", "--check")
    session.run(sys.executable, "-m", "pytest", "-q", "tests/test_docs.py")


@nox.session(venv_backend="none")
def sanitize(session: nox.Session) -> None:
    """The CPU kernels and their driver under ASan and UBSan, on every instruction set here."""
    session.run(sys.executable, "packages/ar-kernels/tests/native/sanitize.py", *session.posargs)


@nox.session(venv_backend="none")
def emulate(session: nox.Session) -> None:
    """The driver of the CPU kernels with AVX512 emulated, on a processor with AVX2 (10 minutes)."""
    session.run(sys.executable, "packages/ar-kernels/tests/native/emulate.py", *session.posargs)


@nox.session
@nox.parametrize("package", PACKAGES)
def isolated(session: nox.Session, package: str) -> None:
    """One package's wheel alone with its in-repo closure: nothing else importable, tests pass."""
    needed = closure(package)
    session.install(*PINS, *wheels(session, needed), "pytest", "hypothesis")
    absent = [name.replace("-", "_") for name in PACKAGES if name not in needed]
    absent += NOT_WITH.get(package, ())
    check = (
        "import importlib.util as u, sys; "
        f"found = [n for n in {absent!r} if u.find_spec(n)]; "
        "sys.exit(f'importable: {found}' if found else 0)"
    )
    session.run("python", "-c", check)
    session.run("python", "-m", "pytest", "-q", f"packages/{package}/tests", *session.posargs)


@nox.session
def wheelcheck(session: nox.Session) -> None:
    """All six wheels: complete, versions agree, installable together, each importable."""
    built = wheels(session, PACKAGES)
    session.run("python", "scripts/check_wheels.py", *built)
    session.install(*PINS, *built)
    for name in PACKAGES:
        session.run("python", "-c", f"import {name.replace('-', '_')}")
    session.run("ar", "schemes", silent=True)


def wheels(session: nox.Session, packages: tuple[str, ...] | list[str]) -> list[str]:
    """Build the wheels of packages and return their paths."""
    folder = Path(session.create_tmp()).resolve() / "wheels"
    for old in folder.glob("*.whl"):
        old.unlink()
    paths = [f"./packages/{name}" for name in packages]
    session.run("pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), *paths)
    return [str(path) for path in sorted(folder.glob("*.whl"))]


def closure(package: str) -> list[str]:
    """Return a package and the siblings it needs, dependencies first."""
    text = Path(f"packages/{package}/pyproject.toml").read_text(encoding="utf-8")
    out: list[str] = []
    for requirement in tomllib.loads(text)["project"]["dependencies"]:
        name = re.split(r"[\[<>=!~; ]", requirement)[0]
        if name in PACKAGES:
            out += [n for n in closure(name) if n not in out]
    return [*out, package]
