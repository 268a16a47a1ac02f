"""The tables of a sweep: docs/models.md, and the file that `ar models` reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    Records = Mapping[str, Mapping[str, Any]]
    Known = Mapping[str, Mapping[str, str]]

DATA = "packages/ar-cli/src/ar_cli/models.json"
PAGE = "docs/models.md"
INTRO = """# Models

Written by `python tests/sweep/run.py --write` (nox session `sweep`); do not edit. `ar models` lists
the same, `ar models DIR` says what would happen with a checkpoint.

Every type of causal language model and of models that see or hear in Transformers {version} is
built tiny (4 blocks, 64 channels, random weights) and taken through: discovery of the blocks; the
walk, whose logits must be those of the plain forward, also with padding and with an image;
gradients for every layer; two tuning steps of SignRound (W4A16, groups of 32), no block worse than
rounding to nearest; the checkpoint, whose names must be those of the source; reading it back with
Transformers; logits equal to the tuned model's (largest difference 1e-4 of the largest logit),
padding and image included. Tiny random weights show that the mechanics are right, not how accurate
a result is.

**{passed} of {total} types pass every step.** *Images*: `yes` where the logits of an image were
compared, too. *16 bit*: layers in blocks that stay as they are, by the reason that the plan gives.
*Not reached*: layers that text does not reach; they are rounded by their weights alone, and the run
says so.
"""


def write_tables(root: Path, records: Records, known: Known) -> None:
    """Write both tables."""
    import transformers

    rows = [row_of(records[kind], known.get(kind)) for kind in sorted(records)]
    data = {"transformers": transformers.__version__, "families": rows}
    (root / DATA).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (root / PAGE).write_text(page(rows, transformers.__version__), encoding="utf-8")


def row_of(record: Mapping[str, Any], known: Mapping[str, str] | None) -> dict[str, Any]:
    """Return what is listed of a family."""
    facts = record["facts"]
    passed = record["failed"] is None
    row = {
        "type": record["model_type"],
        "class": record["class_name"],
        "kind": record["kind"],
        "passes": passed,
        "blocks": facts.get("lists", []),
        "calibration": facts.get("calibration", ""),
        "images": bool(facts.get("images")),
        "quantized": facts.get("quantized", 0),
        "kept": facts.get("kept", {}),
        "unreached": facts.get("unreached", {}),
        "formats": sorted(facts.get("formats", {})) if passed else [],
    }
    if not passed:
        row["step"] = record["failed"]
        row["reason"] = record["error"] if known is None else known["reason"]
    return row


def page(rows: list[dict[str, Any]], version: str) -> str:
    """Return docs/models.md."""
    passed = [row for row in rows if row["passes"]]
    parts = [INTRO.format(version=version, passed=len(passed), total=len(rows))]
    for kind, title in (("text", "Language models"), ("image-text", "Models that see or hear")):
        parts.append(f"\n## {title}\n")
        parts.append("| type | blocks | quantized | images | 16 bit | not reached |")
        parts.append("|---|---|---|---|---|---|")
        parts += [_line(row) for row in passed if row["kind"] == kind]
    parts.append("\n## What does not pass\n")
    parts.append("| type | step | why |\n|---|---|---|")
    parts += [
        f"| {r['type']} | {r['step']} | {_cell(r['reason'])} |" for r in rows if not r["passes"]
    ]
    return "\n".join(parts) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    blocks = ", ".join(f"`{path.partition(' ')[0]}`" for path in row["blocks"])
    kept = "; ".join(f"{count} {_cell(reason)}" for reason, count in row["kept"].items())
    dead = ", ".join(row["unreached"])
    images = "yes" if row["images"] else ""
    return f"| {row['type']} | {blocks} | {row['quantized']} | {images} | {kept} | {dead} |"


def _cell(text: str) -> str:
    return text.replace("|", "/")
