"""Release one package: python scripts/release.py ar-kernels 0.2.0 [--dry-run].

Checks that the tree is clean, the version rises and the changelog's `Unreleased` says something;
dates that section, sets the version, runs the package's checks, commits and tags. Pushes nothing,
and changes no sibling's range.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
_UNRELEASED = re.compile(r"^## Unreleased\n(?P<body>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


class Refused(Exception):
    """A release that cannot be: the message says why."""


def dated(changelog: str, version: str, day: str) -> str:
    """Return a changelog whose `Unreleased` section has become that of a version.

    Raises:
        Refused: there is no such section, or it has no entry.
    """
    found = _UNRELEASED.search(changelog)
    if found is None or "- " not in found["body"]:
        msg = "CHANGELOG.md: no `## Unreleased` section with entries"
        raise Refused(msg)
    return changelog.replace(found[0], f"## {version} - {day}\n{found['body']}", 1)


def raised(text: str, pattern: str, version: str) -> str:
    """Return a file's text with the version that a pattern finds replaced.

    Raises:
        Refused: the pattern does not match exactly once, or the version does not rise.
    """
    found = list(re.finditer(pattern, text, re.MULTILINE))
    if len(found) != 1:
        msg = f"{len(found)} matches of {pattern!r}, exactly one is needed"
        raise Refused(msg)
    old = found[0][1]
    if _key(version) <= _key(old):
        msg = f"version {version} does not rise above {old}"
        raise Refused(msg)
    start, end = found[0].span(1)
    return text[:start] + version + text[end:]


def plan(root: Path, package: str, version: str, day: str) -> dict[Path, str]:
    """Return the new text of every file that a release changes.

    Raises:
        Refused: unknown package, bad version, or nothing to release.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        msg = f"version {version!r} is not of the form 1.2.3"
        raise Refused(msg)
    folder = root / "packages" / package
    if not (folder / "pyproject.toml").is_file():
        known = ", ".join(sorted(p.name for p in (root / "packages").iterdir()))
        msg = f"unknown package {package!r}. Known: {known}."
        raise Refused(msg)
    project, log = folder / "pyproject.toml", folder / "CHANGELOG.md"
    name = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["name"]
    init = folder / "src" / name.replace("-", "_") / "__init__.py"
    return {
        log: dated(log.read_text(encoding="utf-8"), version, day),
        project: raised(project.read_text(encoding="utf-8"), r'^version = "(.*)"$', version),
        init: raised(init.read_text(encoding="utf-8"), r'^__version__ = "(.*)"$', version),
    }


def main() -> int:
    """Release, or with --dry-run name the files that would change."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("package")
    parser.add_argument("version")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    try:
        changes = plan(ROOT, args.package, args.version, datetime.date.today().isoformat())
        if not args.dry_run and _run("git", "status", "--porcelain"):
            msg = "the tree is not clean: commit or put away what is there"
            raise Refused(msg)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    for path, text in changes.items():
        print(path.relative_to(ROOT))
        if not args.dry_run:
            path.write_text(text, encoding="utf-8")
    if not args.dry_run:
        _run(sys.executable, "-m", "nox", "-s", "lint", f"isolated(package='{args.package}')")
        _run("git", "commit", "-am", f"release {args.package} {args.version}")
        _run("git", "tag", f"{args.package}-v{args.version}")
    return 0


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
