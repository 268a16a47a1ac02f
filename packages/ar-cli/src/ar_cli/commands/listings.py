"""`ar schemes`, `ar formats`: what this installation can do."""

from __future__ import annotations

from typing import Any

import click

from ar_cli.output import json_option, print_json, print_records, print_table
from ar_schemes import Scheme
from ar_schemes import schemes as all_schemes

_SAMPLE = (4096, 4096)
"""Shape for which bits per weight are told."""


@click.command()
@json_option
def schemes(as_json: bool) -> None:  # noqa: FBT001
    """List the schemes: what a layer can become."""
    print_records(
        [_scheme(s) for s in all_schemes().values()],
        ("name", "weights", "activations", "bits"),
        as_json=as_json,
    )


def _scheme(found: Scheme) -> dict[str, Any]:
    return {
        "name": found.name,
        "weights": "16 bit" if found.weight is None else str(found.weight),
        "activations": "16 bit" if found.activation is None else str(found.activation),
        "bits": round(found.bits_per_weight(*_SAMPLE), 3),
        **({"flat": found.to_dict()}),
    }


@click.command()
@click.argument("name", required=False)
@json_option
def formats(name: str | None, as_json: bool) -> None:  # noqa: FBT001
    """List the checkpoint formats and the schemes each carries; with NAME, why it does not."""
    from ar_export import format as find_format
    from ar_export import formats as all_formats
    from ar_export.matrix import support_matrix

    matrix = support_matrix()
    if name is not None:
        found = find_format(name)
        rows = [{"scheme": s, "carried": row[found.name] or "yes"} for s, row in matrix.items()]
        print_records(rows, ("scheme", "carried"), as_json=as_json)
        return
    known = all_formats()
    if as_json:
        about = [
            {"name": f.name, "spellings": list(f.spellings), "what": f.summary}
            for f in known.values()
        ]
        print_json({"formats": about, "matrix": matrix})
        return
    print_table(
        ("format", "spellings", "what"),
        [(f.name, ", ".join(f.spellings), f.summary) for f in known.values()],
    )
    click.echo()
    marks = [
        (scheme, *("x" if row[f] is None else "" for f in known)) for scheme, row in matrix.items()
    ]
    print_table(("scheme", *known), marks)
