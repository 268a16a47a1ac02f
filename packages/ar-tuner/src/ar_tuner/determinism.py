"""PyTorch's deterministic algorithms for the time of a run."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_VARIABLE, _VALUE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""Without it cuBLAS has no deterministic products, and PyTorch refuses to call it."""


@contextlib.contextmanager
def deterministic(*, enabled: bool) -> Iterator[None]:
    """Use deterministic algorithms only, as long as the context lasts; then all is as it was.

    cuBLAS reads its variable when it is first used in a process: on a GPU, a process that has
    multiplied before should have set it itself.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    variable = os.environ.get(_VARIABLE)
    os.environ.setdefault(_VARIABLE, _VALUE)
    torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        if variable is None:
            os.environ.pop(_VARIABLE, None)
