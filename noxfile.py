"""The checks. `nox` alone runs lint, types and tests in the current environment."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = True

PACKAGES = ("ar-schemes", "ar-kernels", "ar-tuner", "ar-export", "ar-vlm", "ar-cli")
SOURCES = ("packages", "tests", "scripts", "benchmarks", "noxfile.py")


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Style: ruff check and ruff format; every package with changes has changelog lines."""
    session.run(sys.executable, "-m", "ruff", "check", *SOURCES)
    session.run(sys.executable, "-m", "ruff", "format", "--check", *SOURCES)
    session.run(sys.executable, "scripts/check_changelogs.py")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Types: mypy, strict, over all six packages in one run."""
    session.run(sys.executable, "-m", "mypy")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The whole test suite in the current environment (add pytest arguments after --)."""
    session.run(sys.executable, "-m", "pytest", *session.posargs)


@nox.session
@nox.parametrize("package", PACKAGES)
def isolated(session: nox.Session, package: str) -> None:
    """One package's wheel alone with its in-repo closure: nothing else importable, tests pass."""
    closure = _closure(package)
    wheels = Path(session.create_tmp()) / "wheels"
    session.install("build", "flit_core", "-c", "constraints.txt")
    for name in closure:
        session.run(
            "python", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels),
            f"packages/{name}", silent=True,
        )  # fmt: skip
    found = [str(next(wheels.glob(f"{name.replace('-', '_')}-*.whl"))) for name in closure]
    session.install("-c", "constraints.txt", "torch", *found, "pytest", "hypothesis") if (
        "ar-kernels" in closure
    ) else session.install("-c", "constraints.txt", *found, "pytest", "hypothesis")
    absent = [n.replace("-", "_") for n in PACKAGES if n not in closure]
    if package in ("ar-schemes", "ar-kernels"):
        absent.append("transformers")
    if package == "ar-schemes":
        absent.append("torch")
    check = (
        "import importlib.util, sys; "
        f"found = [n for n in {absent!r} if importlib.util.find_spec(n)]; "
        "sys.exit(f'importable: {found}' if found else 0)"
    )
    session.run("python", "-c", check)
    session.run("python", "-m", "pytest", f"packages/{package}/tests", "-q", *session.posargs)


@nox.session
def wheelcheck(session: nox.Session) -> None:
    """Build all wheels and import each package from them."""
    wheels = Path(session.create_tmp()) / "wheels"
    session.install("build", "flit_core", "-c", "constraints.txt")
    for name in PACKAGES:
        session.run(
            "python", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels),
            f"packages/{name}", silent=True,
        )  # fmt: skip
    session.install("-c", "constraints.txt", "torch", *map(str, wheels.glob("*.whl")))
    for name in PACKAGES:
        session.run("python", "-c", f"import {name.replace('-', '_')}")
    session.run("ar", "schemes", silent=True)


def _closure(package: str) -> list[str]:
    """Return a package and the siblings it needs, dependencies first."""
    document = tomllib.loads(Path(f"packages/{package}/pyproject.toml").read_text("utf-8"))
    out: list[str] = []
    for requirement in document["project"]["dependencies"]:
        name = requirement.split("[")[0].split(">")[0].strip()
        if name in PACKAGES:
            out += [n for n in _closure(name) if n not in out]
    return [*out, package]
