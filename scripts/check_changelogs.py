"""Every package has a changelog whose newest entry is its version or Unreleased."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_HEADING = re.compile(r"^## \[?(?P<name>[^\]\s]+)\]?", re.MULTILINE)


def problems(root: Path) -> list[str]:
    """Return what is wrong, one line per package."""
    out = []
    for package in sorted((root / "packages").iterdir()):
        document = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
        version = document["project"]["version"]
        text = (package / "CHANGELOG.md").read_text(encoding="utf-8")
        found = _HEADING.search(text)
        if found is None or found["name"] not in (version, "Unreleased"):
            out.append(f"{package.name}: newest changelog entry is not {version} or Unreleased")
        elif "- " not in text[found.end() :]:
            out.append(f"{package.name}: the newest changelog entry is empty")
    return out


if __name__ == "__main__":
    found = problems(Path(__file__).parents[1])
    print("\n".join(found) or "changelogs: ok")
    sys.exit(1 if found else 0)
