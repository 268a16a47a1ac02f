"""What the documents say is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MARKDOWN = [
    p
    for p in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part == "out" for part in p.relative_to(ROOT).parts)
]


def commands_of_readme() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Two commands")[2].partition("\n## ")[0]
    return [block.strip() for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL)]


def test_ci_runs_the_second_command_of_the_readme() -> None:
    first, second = commands_of_readme()
    assert "ar quantize --demo" in first
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert second in lines
    steps = [s for s in lines if s and not s.startswith("#")]
    assert steps == ["set -e", 'cd "$(dirname "$0")/.."', second]


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_page_of_hooks_is_that_of_the_specifications() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/generate_docs.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_changelogs_are_in_order() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/check_changelogs.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_page_on_calibration_names_every_set_and_its_examples_can_be_typed() -> None:
    from ar_tuner.calibration import parse_sets
    from ar_tuner.calibration.grammar import OPTIONS
    from ar_tuner.calibration.hub import SETS
    from ar_tuner.calibration.records import CHAT_KEYS, LAST_KEYS, TEXT_KEYS

    page = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    for entry in SETS:
        rows = [line for line in page.splitlines() if line.startswith(f"| `{entry.name}` |")]
        assert len(rows) == 1, entry.name
        place = entry.hub or entry.modelscope
        assert place is not None
        said = (*entry.aliases, *place.splits, *(entry.pair or ()), entry.key or "")
        assert all(f"`{word}`" in rows[0] for word in said if word), entry.name
    assert all(f"| `{option}" in page for option in OPTIONS)
    assert all(f"`{key}`" in page for key in (*TEXT_KEYS, *CHAT_KEYS, *LAST_KEYS))
    examples = page.partition("SET = NAME[:option[=value]]...\n")[2].partition("```")[0]
    read = [parse_sets(line) for line in examples.splitlines()]
    assert [[r.num for r in sets] for sets in read] == [[None, 64], [None, 32], [64, None]]
    assert read[1][0].system_prompt == "Answer briefly, in English."
    assert read[2][0].name == r"C:\data\a.json"
