"""One process per run directory."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class RunLock:
    """An advisory lock on a directory; the system lets go of it when the process dies."""

    handle: int

    @classmethod
    def take(cls, directory: Path) -> RunLock:
        """Return the lock.

        Raises:
            TunerError: another process holds it.
        """
        handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            msg = f"another process is working in the run directory {directory}"
            raise TunerError(msg) from error
        return cls(handle)

    def release(self) -> None:
        """Let go of it."""
        os.close(self.handle)
