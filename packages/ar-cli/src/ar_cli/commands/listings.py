"""`ar schemes`, `ar formats`, `ar backends`: what this installation can do."""

from __future__ import annotations

from typing import Any

import click

from ar_cli.output import json_option, print_records
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
@json_option
def formats(as_json: bool) -> None:  # noqa: FBT001
    """List the checkpoint formats, their spellings and the presets each carries."""
    from ar_export import formats as all_formats
    from ar_kernels import data_types

    records = []
    for found in all_formats().values():
        carried = [
            s.name
            for s in all_schemes().values()
            if s.weight is not None
            and s.weight.data_type in data_types()
            and s.activation is None
            and found.refuses(found.spellings[0], s, *_SAMPLE) is None
        ]
        records.append(
            {
                "name": found.name,
                "spellings": ", ".join(found.spellings),
                "what": found.summary,
                "carries": ", ".join(carried),
            }
        )
    print_records(records, ("name", "spellings", "what", "carries"), as_json=as_json)


@click.command()
@json_option
def backends(as_json: bool) -> None:  # noqa: FBT001
    """List the kernel backends, how far each was tried, and what this machine lacks."""
    from ar_kernels import backends as all_backends

    found = sorted(all_backends().values(), key=lambda b: -b.priority)
    print_records(
        [
            {
                "name": b.name,
                "priority": b.priority,
                "status": b.status,
                "here": b.missing() or "usable",
            }
            for b in found
        ],
        ("name", "priority", "status", "here"),
        as_json=as_json,
    )
