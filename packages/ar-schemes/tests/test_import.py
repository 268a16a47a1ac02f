from __future__ import annotations

import os
import subprocess
import sys

import ar_schemes


def test_importing_and_listing_needs_no_torch() -> None:
    code = "import sys, ar_schemes; ar_schemes.schemes(); print('torch' in sys.modules)"
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path, "AR_PLUGINS": ""},
    )
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there() -> None:
    assert all(hasattr(ar_schemes, name) for name in ar_schemes.__all__)
