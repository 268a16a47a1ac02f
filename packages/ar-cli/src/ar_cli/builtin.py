"""The first-party commands, entering through the hook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_cli.commands import (
    backends,
    bench,
    checkpoint,
    convert,
    doctor,
    evaluate,
    generate,
    listings,
    models,
    plan,
    plugins,
    quantize,
)
from ar_cli.hookspecs import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def ar_register_commands() -> list[click.Command]:
    """Return the built-in commands, in the order of `ar --help`."""
    return [
        quantize.quantize,
        plan.plan,
        evaluate.evaluate,
        checkpoint.inspect,
        checkpoint.verify,
        convert.convert,
        convert.compare,
        generate.generate,
        bench.bench,
        listings.schemes,
        listings.formats,
        backends.backends,
        models.models,
        plugins.plugins,
        doctor.doctor,
    ]
