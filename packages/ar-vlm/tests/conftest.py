from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ar_tuner.registry import host
from ar_vlm import plugin, read_samples
from ar_vlm.testing import make_tiny, missing_package, write_samples

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ar_vlm import Sample


@pytest.fixture(autouse=True)
def _installed() -> None:
    """Our plugin, known to ar-tuner whether or not its entry point is installed."""
    host().load()
    if not any(r.name == "ar_vlm" and r.status == "ok" for r in host().records):
        host()._register("ar_vlm", plugin, "ar-vlm", "0")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder of a small model, made once; skips where it cannot be."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if (needed := missing_package(family)) is not None:
            pytest.skip(f"the image processor of {family} needs {needed}")
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.fixture(scope="session")
def samples_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 16 chats about drawn pictures of several sizes."""
    return write_samples(tmp_path_factory.mktemp("samples"), 16)


@pytest.fixture(scope="session")
def samples(samples_file: Path) -> list[Sample]:
    return read_samples(samples_file)
