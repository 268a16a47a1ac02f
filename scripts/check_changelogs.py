"""Every package has a changelog whose newest entry is its version or `Unreleased`.

An `Unreleased` heading without lines does not count as an entry.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_SECTION = re.compile(
    r"^## \[?(?P<name>[^\]\s]+)\]?[^\n]*\n(?P<body>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL
)


def problems(root: Path) -> list[str]:
    """Return what is wrong, one line per package."""
    out = []
    for package in sorted(p.parent for p in (root / "packages").glob("*/pyproject.toml")):
        document = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
        version = document["project"]["version"]
        sections = list(_SECTION.finditer((package / "CHANGELOG.md").read_text(encoding="utf-8")))
        if sections and sections[0]["name"] == "Unreleased" and "- " not in sections[0]["body"]:
            del sections[0]
        found = sections[0] if sections else None
        if found is None:
            out.append(f"{package.name}: the changelog has no entry for {version} or Unreleased")
        elif found["name"] not in (version, "Unreleased"):
            out.append(
                f"{package.name}: the newest changelog entry is {found['name']}, "
                f"not {version} or Unreleased"
            )
        elif "- " not in found["body"]:
            out.append(f"{package.name}: the newest changelog entry is empty")
    return out


if __name__ == "__main__":
    found = problems(Path(__file__).parents[1])
    print("\n".join(found) or "changelogs: ok")
    sys.exit(1 if found else 0)
