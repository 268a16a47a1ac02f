"""`ar plan`: what would happen, without touching a weight."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from ar_cli.commands.options import check_scheme, plan_options, settings_from
from ar_cli.output import json_option, print_json, print_table, size
from ar_cli.quiet import hush

if TYPE_CHECKING:
    from ar_schemes import LayerPlan, PlanRow

_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@click.command()
@click.argument("model")
@click.option("--format", help="As written in this format, which may mix types over layers.")
@plan_options
@click.option("--all", "every", is_flag=True, help="One line per layer, blocks not joined.")
@json_option
def plan(  # noqa: PLR0913 - one parameter per group of options
    model: str,
    format: str | None,  # noqa: A002
    scheme: str | None,
    every: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
    **options: Any,
) -> None:
    """Show what each layer of MODEL would get: scheme, bits, size and the reason."""
    settings = settings_from(options)
    check_scheme(scheme, settings)
    hush()
    from ar_tuner import AutoRound

    job = AutoRound(model, scheme=scheme, **settings)
    if format is not None:
        job.write_as(format)
    made = job.plan()
    if as_json:
        print_json({"layers": [_record(r) for r in made.rows], **_totals(made)})
        return
    rows = [[r.layer.name, 1, *_cells(r)] for r in made.rows] if every else _joined(made)
    print_table(("layer", "count", "shape", "scheme", "bits", "reason"), rows)
    totals = _totals(made)
    click.echo(
        f"\n{totals['quantized']} of {len(made.rows)} layers quantized, "
        f"{totals['bits_per_weight']:.3f} bits per quantized weight (scales included), "
        f"about {size(totals['bytes'])} in all."
    )


def _record(row: PlanRow) -> dict[str, Any]:
    return {
        "name": row.layer.name,
        "shape": [row.layer.rows, row.layer.columns],
        "copies": row.layer.copies,
        "role": row.layer.role,
        "scheme": row.scheme.name,
        "bits_per_weight": round(_bits(row), 4),
        "reason": row.reason,
    }


def _totals(made: LayerPlan) -> dict[str, Any]:
    stored = sum(_bits(r) * r.layer.weights for r in made.rows if not r.layer.tied)
    return {
        "quantized": len(made.quantized),
        "bits_per_weight": made.bits_per_weight,
        "bytes": int(stored / 8),
    }


def _bits(row: PlanRow) -> float:
    return row.scheme.bits_per_weight(row.layer.rows, row.layer.columns)


def _cells(row: PlanRow) -> list[object]:
    copies = f" x{row.layer.copies}" if row.layer.copies > 1 else ""
    shape = f"{row.layer.rows} x {row.layer.columns}{copies}"
    return [shape, row.scheme.name, round(_bits(row), 3), row.reason]


def _joined(made: LayerPlan) -> list[list[object]]:
    """Return one line for layers that differ by numbers in their names only."""
    groups: dict[tuple[object, ...], list[PlanRow]] = {}
    for row in made.rows:
        key = (_NUMBER.sub(".*", row.layer.name), *map(str, _cells(row)))
        groups.setdefault(key, []).append(row)
    return [
        [key[0] if len(rows) > 1 else rows[0].layer.name, len(rows), *_cells(rows[0])]
        for key, rows in groups.items()
    ]
