"""A command: says hello."""

from __future__ import annotations

import click

from ar_cli import hookimpl


@click.command()
def greet() -> None:
    """Say hello."""
    click.echo("hello from a plugin")


@hookimpl
def ar_register_commands() -> list[click.Command]:
    """Return the command."""
    return [greet]
