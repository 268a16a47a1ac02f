"""A directory that appears under its name complete or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from typing import TYPE_CHECKING

from ar_export.errors import ExportError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)


class StagedFolder:
    """Files are put into a hidden sibling of the output, which takes its name at the end.

    The sibling carries the process number, so that two runs into one output do not mix; siblings
    of processes that are gone are removed.
    """

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        self._given = output
        self._output = output.resolve()  # a link keeps pointing at what it pointed at
        self._overwrite = overwrite
        self._staging = self._sibling("partial", os.getpid())
        self._made: list[Path] = []

    def check(self) -> None:
        """Refuse an output that could not be written in the end; touches nothing.

        Raises:
            ExportError: the output is a file, holds something, or its parent cannot be written.
        """
        out, shown = self._output, str(self._given)
        if not out.name:
            msg = f"output {shown!r} is the root of the file system; give a directory below it"
            raise ExportError(msg)
        if out.exists() and not out.is_dir():
            msg = f"output {shown!r} is a file; give a directory"
            raise ExportError(msg)
        if _filled(out):
            self._check_replaceable()
        parent = next(p for p in out.parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            what = "is not a directory" if not parent.is_dir() else "is not writable"
            msg = f"output {shown!r} cannot be written: {str(parent)!r} {what}"
            raise ExportError(msg)

    def path(self) -> Path:
        """Return the folder to write into, made on first use; leftovers of dead runs go.

        Raises:
            ExportError: it cannot be made.
        """
        if not self._made:
            try:
                self._remove_leftovers()
                missing = [p for p in self._staging.parents if not p.exists()]
                self._staging.mkdir(parents=True)
            except OSError as error:
                msg = f"output {str(self._given)!r} cannot be written: {error}"
                raise ExportError(msg) from error
            self._made = [self._staging, *missing]
        return self._staging

    def commit(self) -> Path:
        """Sync everything and give the folder its name at once; return the output.

        A directory that is replaced is moved aside first and removed last.

        Raises:
            ExportError: something was put there meanwhile, or the disk refuses.
        """
        staging = self.path()
        self.check()
        try:
            for path in staging.rglob("*"):
                _sync(path)
            _sync(staging)
            old = self._swap(staging)
            _sync(self._output.parent)
        except OSError as error:
            msg = f"output {str(self._given)!r} cannot be written: {error}"
            raise ExportError(msg) from error
        self._made = []
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
            if old.exists():
                log.warning("the replaced checkpoint is left at %s: it cannot be removed", old)
        return self._given

    def abort(self) -> None:
        """Remove what was staged, and the parents that were made for it."""
        if not self._made:
            return
        staging, *parents = self._made
        self._made = []
        shutil.rmtree(staging, ignore_errors=True)
        for parent in parents:
            if _filled(parent):  # someone else uses it by now
                break
            parent.rmdir()

    def _swap(self, staging: Path) -> Path | None:
        """Rename the staged folder to the output; return where the old output went."""
        old = None
        if _filled(self._output):
            old = self._sibling("old", os.getpid())
            self._output.rename(old)
        elif self._output.is_dir():
            self._output.rmdir()
        try:
            staging.rename(self._output)
        except OSError:
            if old is not None:
                old.rename(self._output)
            raise
        return old

    def _check_replaceable(self) -> None:
        shown = str(self._given)
        if not self._overwrite:
            msg = (
                f"output directory {shown!r} is not empty. Give another, or allow it to be "
                "replaced (--overwrite)."
            )
            raise ExportError(msg)
        if not (self._output / "config.json").is_file():
            msg = (
                f"output directory {shown!r} is not empty and holds no config.json, so it is no "
                "checkpoint and will not be replaced. Give another, or remove it yourself."
            )
            raise ExportError(msg)

    def _sibling(self, role: str, process: int) -> Path:
        return self._output.parent / f".{self._output.name}.{process}.{role}"

    def _remove_leftovers(self) -> None:
        parent = self._output.parent
        if not parent.is_dir():
            return
        start, end = f".{self._output.name}.", ".partial"
        for path in parent.iterdir():
            number = path.name.removeprefix(start).removesuffix(end)
            ours = number.isdecimal() and path.name == f"{start}{number}{end}"
            if ours and not _runs(int(number)):
                log.info("removing %s, left by a run that was killed", path)
                shutil.rmtree(path, ignore_errors=True)


def _filled(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _runs(process: int) -> bool:
    """Tell whether another process with this number runs."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs and is not ours
        return True
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
