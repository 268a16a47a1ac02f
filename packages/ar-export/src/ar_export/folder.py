"""A directory that appears under its name complete or not at all."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from ar_export.errors import ExportError

if TYPE_CHECKING:
    from pathlib import Path


class StagedFolder:
    """Files are put into a hidden sibling of the output, which takes its name at the end."""

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        self._output = output
        self._overwrite = overwrite
        self._staging = output.with_name(f".{output.name}.partial")
        self._open = False

    def check(self) -> None:
        """Refuse an output that could not be written in the end; touches nothing.

        Raises:
            ExportError: the output is a file, holds something, or its parent cannot be written.
        """
        out = self._output
        if out.exists() and not out.is_dir():
            msg = f"output {str(out)!r} is a file; give a directory"
            raise ExportError(msg)
        if out.is_dir() and any(out.iterdir()) and not self._overwrite:
            msg = (
                f"output directory {str(out)!r} is not empty. Give another, or allow it to be "
                "replaced (--overwrite)."
            )
            raise ExportError(msg)
        parent = next(p for p in out.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            what = "is not a directory" if not parent.is_dir() else "is not writable"
            msg = f"output {str(out)!r} cannot be written: {str(parent)!r} {what}"
            raise ExportError(msg)

    def path(self) -> Path:
        """Return the folder to write into, made on first use; leftovers of a dead run go."""
        if not self._open:
            shutil.rmtree(self._staging, ignore_errors=True)
            try:
                self._staging.mkdir(parents=True)
            except OSError as error:
                msg = f"output {str(self._output)!r} cannot be written: {error}"
                raise ExportError(msg) from error
            self._open = True
        return self._staging

    def commit(self) -> Path:
        """Sync everything and give the folder its name at once; return it."""
        staging = self.path()
        for path in staging.rglob("*"):
            _sync(path)
        _sync(staging)
        old = self._output.with_name(f".{self._output.name}.old")
        if self._output.is_dir() and any(self._output.iterdir()):
            self.check()
            shutil.rmtree(old, ignore_errors=True)
            self._output.rename(old)
        staging.rename(self._output)
        _sync(self._output.parent)
        shutil.rmtree(old, ignore_errors=True)
        self._open = False
        return self._output

    def abort(self) -> None:
        """Remove what was staged."""
        if self._open:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._open = False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
