"""Look into built wheels: python scripts/check_wheels.py WHEEL..."""

from __future__ import annotations

import sys
import zipfile
from email.parser import Parser
from pathlib import Path


def problems(path: Path) -> list[str]:
    """Return what is wrong with a wheel, one line each."""
    dist, version = path.name.split("-")[:2]
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        info = f"{dist}-{version}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        source = wheel.read(f"{dist}/__init__.py").decode()
    out = []
    if f"{dist}/py.typed" not in names:
        out.append("py.typed is missing")
    if not any(n.startswith(info) and n.endswith("LICENSE") for n in names):
        out.append("the license is missing")
    out += [f"{n} does not belong here" for n in names if not n.startswith((f"{dist}/", info))]
    out += [f"{n} is a leftover" for n in names if n.endswith(".pyc") or "/tests/" in n]
    if f'__version__ = "{metadata["Version"]}"' not in source:
        out.append(f"__version__ is not that of the metadata, {metadata['Version']}")
    if not metadata.get_payload().strip():
        out.append("the long description is empty")
    return [f"{path.name}: {line}" for line in out]


if __name__ == "__main__":
    found = [line for name in sys.argv[1:] for line in problems(Path(name))]
    print("\n".join(found) or f"wheels: {len(sys.argv) - 1} ok")
    sys.exit(1 if found else 0)
