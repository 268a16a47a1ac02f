"""`ar plan`: what would happen, without touching a weight unless schemes are to be chosen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ar_cli.commands.auto import auto_options, auto_scheme, print_front
from ar_cli.commands.options import check_scheme, plan_options, settings_from
from ar_cli.output import json_option, print_json, print_table, size
from ar_cli.progress import Progress
from ar_cli.quiet import hush

if TYPE_CHECKING:
    from ar_schemes import LayerPlan, PlanRow
    from ar_tuner import AutoRound, AutoScheme

_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@click.command()
@click.argument("model")
@click.option("--format", help="As written in this format, which may mix types over layers.")
@plan_options
@auto_options
@click.option("--device", "device_map", help="Where layers are scored: cpu, cuda, cuda:1, ...")
@click.option("--dtype", "model_dtype", help="Type to score in; default: as stored.")
@click.option(
    "--save-plan", type=click.Path(path_type=Path), help="Write the plan for --layer-config."
)
@click.option(
    "--save-front", type=click.Path(path_type=Path), help="Write choice and front as JSON."
)
@click.option("--all", "every", is_flag=True, help="One line per layer, blocks not joined.")
@json_option
def plan(  # noqa: PLR0913 - one parameter per group of options
    model: str,
    format: str | None,  # noqa: A002
    scheme: str | None,
    save_plan: Path | None,
    save_front: Path | None,
    every: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
    **options: Any,
) -> None:
    """Show what each layer of MODEL would get: scheme, bits, size and the reason.

    With --avg-bits or --target-size layers are scored first, and the other plans on the way from
    the smallest to the largest are shown too.
    """
    asked = auto_scheme(options, scheme)
    settings = settings_from(options)
    check_scheme(scheme, settings)
    hush()
    job = _job(model, scheme if asked is None else asked, format, settings)
    made = job.plan()
    if save_plan is not None:
        job.save_plan(save_plan)
    if save_front is not None:
        job.save_front(save_front)
    if as_json:
        chosen = {} if asked is None else job.front()
        print_json({"layers": [_record(r) for r in made.rows], **_totals(made), **chosen})
        return
    rows = [[r.layer.name, 1, *_cells(r)] for r in made.rows] if every else _joined(made)
    print_table(("layer", "count", "shape", "scheme", "bits", "reason"), rows)
    if job.chooser is not None:
        click.echo()
        print_front(job.chooser.choices[0])
    totals = _totals(made)
    kept = f"{totals['kept']} kept as the source stores them, " if totals["kept"] else ""
    click.echo(
        f"\n{totals['quantized']} of {len(made.rows)} layers quantized, {kept}"
        f"{totals['bits_per_weight']:.3f} bits per quantized weight (scales included), "
        f"about {size(totals['bytes'])} in all."
    )


def _job(
    model: str,
    scheme: str | AutoScheme | None,
    format: str | None,  # noqa: A002
    settings: dict[str, Any],
) -> AutoRound:
    from ar_tuner import AutoRound

    job = AutoRound(model, scheme=scheme, on_event=Progress(), **settings)
    if format is None and job.chooser is not None:
        format = "auto_round"  # noqa: A001 - bits are those of a file
    if format is not None:
        job.write_as(format)
    return job


def _record(row: PlanRow) -> dict[str, Any]:
    return {
        "name": row.layer.name,
        "shape": [row.layer.rows, row.layer.columns],
        "copies": row.layer.copies,
        "role": row.layer.role,
        "scheme": row.written.name,
        "kept": row.kept,
        "bits_per_weight": round(row.bits_per_weight, 4),
        "reason": row.reason,
    }


def _totals(made: LayerPlan) -> dict[str, Any]:
    stored = sum(r.stored_bits for r in made.rows if not r.layer.tied)
    return {
        "quantized": len(made.quantized),
        "kept": len(made.kept),
        "bits_per_weight": made.bits_per_weight,
        "bytes": int(stored / 8),
    }


def _cells(row: PlanRow) -> list[object]:
    copies = f" x{row.layer.copies}" if row.layer.copies > 1 else ""
    shape = f"{row.layer.rows} x {row.layer.columns}{copies}"
    return [shape, row.written.name, round(row.bits_per_weight, 3), row.reason]


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
