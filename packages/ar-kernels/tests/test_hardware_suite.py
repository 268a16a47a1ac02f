"""The suite that owners of hardware run, on the hardware that is here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_one_line_runs_every_backend_of_this_machine() -> None:
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    line = ["-m", "pytest", "--pyargs", "ar_kernels.testing.hardware", "-q", "-rs"]
    options = ["-p", "no:cacheprovider", "-o", "addopts=", "-k", "dense or cuda_triton"]
    done = subprocess.run(
        [sys.executable, *line, *options], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "skipped" in done.stdout  # no machine has every device
