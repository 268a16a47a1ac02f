"""Time left and memory used."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch


class Eta:
    """Estimates the time left from the blocks done in this process."""

    def __init__(self, total: int) -> None:
        self._left = total
        self._done = 0
        self._began = time.perf_counter()

    def skip(self) -> None:
        """Count a block that was restored: it says nothing of the speed."""
        self._left -= 1
        self._began = time.perf_counter() if self._done == 0 else self._began

    def done(self) -> None:
        """Count a block that was worked on."""
        self._left -= 1
        self._done += 1

    def seconds_left(self) -> float | None:
        """Return the estimate in seconds, or None before the first block is done."""
        if self._done == 0:
            return None
        return (time.perf_counter() - self._began) / self._done * self._left


def peak_bytes() -> int:
    """Return the largest memory of this process so far: the device's if one is used, else RAM."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would begin at what the parent process held at the fork
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
