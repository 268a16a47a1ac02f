"""What several tests of the CPU kernels share."""

from __future__ import annotations

import pytest

from ar_kernels.native import library


@pytest.fixture(params=library.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on each instruction set of this processor."""
    name: str = request.param
    if name not in library.supported():
        pytest.skip(f"the processor lacks {name}")
    monkeypatch.setenv(library.ISA_ENV, name)
    return name
