"""Look up commands."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import click

from ar_cli import builtin, hookspecs
from ar_cli.archiver import is_archiver_call
from ar_schemes import PluginError, PluginHost, Registry

if TYPE_CHECKING:
    from collections.abc import Mapping


@functools.cache
def host() -> PluginHost:
    """Return the process's host of ar-cli, made on first use."""
    return PluginHost("ar_cli", hookspecs, builtins={"builtin": builtin})


@functools.cache
def _commands() -> Registry[click.Command]:
    return Registry(host(), "ar_register_commands", kind=click.Command, name_of=_name_of)


def commands() -> Mapping[str, click.Command]:
    """Return every command, plugins' included."""
    return _commands().all()


def command(name: str) -> click.Command | None:
    """Return a command by name, or None."""
    return _commands().find(name)


def _name_of(found: click.Command) -> str:
    name = found.name or ""
    if is_archiver_call([name]):
        msg = f"command name {name!r} has the form of an archiver's call; choose a longer word"
        raise PluginError(msg)
    return name
