"""The group of all commands, and how mistakes end."""

from __future__ import annotations

import difflib
import sys
from typing import TYPE_CHECKING, Any

import click

from ar_cli import __version__, registry
from ar_schemes import ArError

if TYPE_CHECKING:
    from collections.abc import Sequence

_USAGE = 2
_INTERRUPTED = 130


class Mistake(click.ClickException):
    """An error that the user can put right: shown without a traceback, exit status 2."""

    exit_code = _USAGE

    def show(self, file: Any = None) -> None:
        """Write the message to stderr."""
        click.echo(f"Error: {self.format_message()}", file=file, err=file is None)


class ArGroup(click.Group):
    """The group whose commands come through the hook."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names of all commands."""
        return list(registry.commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return a command; built-in ones are found without loading plugins."""
        return registry.command(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command; an unknown one names the nearest."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            known = self.list_commands(ctx)
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"no such command {name!r}.{hint} Commands: {', '.join(known)}.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; our errors become messages."""
        try:
            return super().invoke(ctx)
        except ArError as error:
            raise Mistake(str(error)) from error


@click.group(
    cls=ArGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "--version", prog_name="ar")
def cli() -> None:
    """Quantize language models to 2-8 bits, check what was lost, run the result."""


def run(args: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    try:
        result = cli.main(args=list(args), prog_name="ar", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        kept = " Finished blocks are kept; the same command with --resume goes on."
        click.echo(f"Interrupted.{kept if list(args[:1]) == ['quantize'] else ''}", err=True)
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return result if isinstance(result, int) else 0
