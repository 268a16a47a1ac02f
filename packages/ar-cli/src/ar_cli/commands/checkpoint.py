"""`ar inspect` and `ar verify`: what a checkpoint holds, and whether it is sound."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ar_cli.output import json_option, print_json, print_table, size
from ar_cli.quiet import hush

if TYPE_CHECKING:
    from ar_export import LayerEntry, Readable


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--all", "every", is_flag=True, help="One line per layer.")
@json_option
def inspect(directory: Path, every: bool, as_json: bool) -> None:  # noqa: FBT001
    """Show what DIRECTORY holds: format, schemes, layers, size."""
    hush()
    from ar_export import open_checkpoint

    found = open_checkpoint(directory)
    facts = _facts(found)
    layers = [_record(name, entry) for name, entry in found.quantized.items()]
    if as_json:
        print_json({**facts, "layers": layers})
        return
    print_table(("", ""), [(k, _shown(k, v)) for k, v in facts.items()])
    if every:
        click.echo()
        print_table(
            ("layer", "shape", "scheme", "layout"),
            [
                (r["name"], f"{r['rows']} x {r['columns']}", r["scheme"], r["layout"])
                for r in layers
            ],
        )
    elif layers:
        counted = Counter((r["scheme"], r["layout"]) for r in layers)
        click.echo()
        print_table(("scheme", "layout", "layers"), [(*k, n) for k, n in counted.items()])


def _facts(found: Readable) -> dict[str, Any]:
    architectures = found.config.get("architectures") or ["unknown"]
    return {
        "architecture": ", ".join(architectures),
        "format": found.format,
        "packing": (found.quantization_config or {}).get("packing_format"),
        "layers": len(found.quantized),
        "tensors": len(found.names),
        "files": len(set(found.files.values())),
        "bytes": found.total_bytes,
    }


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "-"
    return size(value) if key == "bytes" else str(value)


def _record(name: str, entry: LayerEntry) -> dict[str, Any]:
    from ar_schemes import describe

    return {
        "name": name,
        "rows": entry.rows,
        "columns": entry.columns,
        "scheme": describe(entry.scheme),
        "layout": entry.layout,
    }


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Another checkpoint with the same quantized weights: bits are compared.",
)
@json_option
def verify(directory: Path, against: Path | None, as_json: bool) -> int:  # noqa: FBT001
    """Check that DIRECTORY is sound: files, names, shapes, configs, every layer's bits."""
    hush()
    from ar_export import open_checkpoint
    from ar_export import verify as check

    expected = None if against is None else open_checkpoint(against).weight
    report = check(directory, expected=expected)
    if as_json:
        print_json(
            {**vars(report), "ok": report.ok, "findings": [vars(f) for f in report.findings]}
        )
    else:
        for finding in report.findings:
            click.echo(f"{finding.level}: {finding.where}: {finding.what}")
        compared = f", {report.compared} compared bit by bit" if report.compared else ""
        verdict = "sound" if report.ok else "NOT sound"
        click.echo(
            f"{verdict}: {report.layers} quantized layers, {report.tensors} tensors{compared}"
        )
    return 0 if report.ok else 1
