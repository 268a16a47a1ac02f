from __future__ import annotations

import subprocess
import sys


def test_importing_needs_no_torch() -> None:
    code = (
        "import sys, ar_schemes; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    import ar_schemes

    assert all(hasattr(ar_schemes, name) for name in ar_schemes.__all__)
