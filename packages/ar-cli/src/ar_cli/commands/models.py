"""`ar models`: families of models, what was verified of each, what a checkpoint would get."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ar_cli.output import json_option, print_json, print_table
from ar_cli.quiet import hush
from ar_schemes import ArError

if TYPE_CHECKING:
    from collections.abc import Sequence

_COLUMNS = ("type", "kind", "verified", "blocks", "quantized", "images", "remarks")


@click.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--type", "word", help="Only types with this in their names.")
@json_option
def models(directory: Path | None, *, word: str | None, as_json: bool) -> None:
    """List the families of models, as a tiny model of each went through every step.

    With DIRECTORY, say what is known of that checkpoint's family and what would happen with it; no
    weights are read. `ar plan` has every layer.
    """
    data = verified()
    if directory is not None:
        _show(directory, data, as_json=as_json)
        return
    rows = [r for r in data["families"] if word is None or word in r["type"]]
    if as_json:
        print_json({**data, "families": rows})
        return
    print_table(_COLUMNS, [_cells(row) for row in rows])
    passed = sum(1 for row in rows if row["passes"])
    click.echo(
        f"\n{passed} of {len(rows)} types pass every step with Transformers "
        f"{data['transformers']}; others may well work, see their remarks."
    )


def verified() -> dict[str, Any]:
    """Return the table that the sweep has made: Transformers' version, and one entry per type."""
    text = resources.files("ar_cli").joinpath("models.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _cells(row: dict[str, Any]) -> Sequence[object]:
    return (
        row["type"],
        row["kind"],
        "yes" if row["passes"] else f"no: {row['step']}",
        ", ".join(path.partition(" ")[0] for path in row["blocks"]) or "-",
        row["quantized"],
        "yes" if row["images"] else "-",
        _remarks(row),
    )


def _remarks(row: dict[str, Any]) -> str:
    if not row["passes"]:
        return str(row["reason"])
    kept = [f"{count} in 16 bit: {reason}" for reason, count in row["kept"].items()]
    dead = [f"text does not reach {', '.join(row['unreached'])}"] if row["unreached"] else []
    return "; ".join([*kept, *dead])


def _show(path: Path, data: dict[str, Any], *, as_json: bool) -> None:
    """Say what would happen with a checkpoint.

    Raises:
        ArError: no checkpoint, or one whose blocks cannot be told.
    """
    from ar_tuner import AutoRound

    file = path / "config.json"
    if not file.is_file():
        msg = f"{path} has no config.json: not a Transformers checkpoint"
        raise ArError(msg)
    kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    known = next((row for row in data["families"] if row["type"] == kind), None)
    hush()
    plan = AutoRound(path).plan()
    blocks = {r.layer.block for r in plan.rows if r.layer.block is not None}
    kept: dict[str, int] = {}
    for row in plan.fallbacks:
        kept[row.reason] = kept.get(row.reason, 0) + 1
    lists = sorted({name.rpartition(".")[0] for name in blocks})
    found = {
        "model_type": kind,
        "verified": bool(known and known["passes"]),
        "family": known,
        "lists": lists,
        "blocks": len(blocks),
        "quantized": len(plan.quantized),
        "kept": kept,
    }
    if as_json:
        print_json(found)
        return
    click.echo(f"type: {kind} ({_verdict(known, data['transformers'])})")
    click.echo(f"blocks: {len(blocks)} in {', '.join(lists)}")
    click.echo(f"layers to be quantized ({plan.default.name}): {len(plan.quantized)}")
    for reason, count in kept.items():
        click.echo(f"  in 16 bit: {count}: {reason}")


def _verdict(known: dict[str, Any] | None, version: str) -> str:
    if known is None:
        return f"not a type of Transformers {version}: the generic rules apply"
    if known["passes"]:
        images = ", images too" if known["images"] else ""
        return f"verified with a tiny model, Transformers {version}{images}"
    return f"not verified: {known['reason']}"
