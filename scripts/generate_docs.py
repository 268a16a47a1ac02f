"""Write the generated part of docs/plugins.md: every hook with its signature and text.

python scripts/generate_docs.py [--check]
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plugins.md"
BEGIN, END = "<!-- hooks: begin -->", "<!-- hooks: end -->"
HOSTS = ("ar_schemes", "ar_kernels", "ar_tuner", "ar_export", "ar_cli")


def hooks() -> str:
    """Return the section on hooks, from the sources."""
    out = []
    for host in HOSTS:
        source = ROOT / "packages" / host.replace("_", "-") / "src" / host / "hookspecs.py"
        out.append(f"### {host}\n")
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("ar_"):
                returns = ast.unparse(node.returns) if node.returns else "None"
                out.append(f"`{node.name}({ast.unparse(node.args)}) -> {returns}`\n")
                out.append(f"{ast.get_docstring(node)}\n")
    return "\n".join(out)


def main() -> int:
    """Write the page, or with --check tell whether it is current."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    wanted = f"{before}{BEGIN}\n\n{hooks()}\n{END}{after}"
    if "--check" in sys.argv:
        if text != wanted:
            print("docs/plugins.md is out of date: run python scripts/generate_docs.py")
            return 1
        return 0
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
