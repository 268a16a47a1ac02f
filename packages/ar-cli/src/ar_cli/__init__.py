"""The `ar` command."""

from ar_cli.hookspecs import hookimpl

__version__ = "0.1.0"

__all__ = ["hookimpl"]
