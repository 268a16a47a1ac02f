"""`ar plugins`: who extends this installation, and whether it works."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import click

from ar_cli.output import json_option, print_records
from ar_cli.quiet import hush
from ar_schemes import HOSTS

if TYPE_CHECKING:
    from ar_schemes import PluginRecord

_COLLECT = {
    "ar_schemes": ("schemes",),
    "ar_kernels": ("data_types", "layouts", "backends"),
    "ar_tuner": ("algorithms", "datasets"),
    "ar_export": ("formats",),
    "ar_cli": ("commands",),
}


@click.command()
@click.option("--check", is_flag=True, help="Exit with status 1 when a plugin is broken.")
@json_option
def plugins(check: bool, as_json: bool) -> int:  # noqa: FBT001
    """List the plugins of every package: where from, what they provide, what broke."""
    hush()
    records = [record for name in HOSTS for record in records_of(name)]
    rows = [_row(r) for r in records]
    columns = ("host", "plugin", "from", "status", "provides", "error")
    print_records(rows, columns, as_json=as_json)
    return 1 if check and any(r.status == "failed" for r in records) else 0


def records_of(host: str) -> tuple[PluginRecord, ...]:
    """Return what is known of a host's plugins after every registry was filled."""
    registry: Any = importlib.import_module(f"{host}.registry")
    for collect in _COLLECT[host]:
        getattr(registry, collect)()
    found: Any = registry.host()
    found.load()
    records: tuple[PluginRecord, ...] = found.records
    return records


def _row(record: PluginRecord) -> dict[str, Any]:
    shown = [*record.provides[:6], *(["..."] if len(record.provides) > 6 else [])]  # noqa: PLR2004
    version = f" {record.version}" if record.version else ""
    return {
        "host": record.host,
        "plugin": record.name,
        "from": f"{record.dist}{version}",
        "status": record.status,
        "provides": ", ".join(shown) or ", ".join(record.hooks),
        "error": record.error,
    }
