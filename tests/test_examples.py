"""The examples run as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_a_vision_language_model_answers_the_same_after_the_way_to_disk_and_back(
    family: str, tmp_path: Path
) -> None:
    script = runpy.run_path(str(EXAMPLES / "vision-language" / "quantize.py"))
    found = script["main"](tmp_path, family)
    assert found["answers"] == found["reloaded"]
    assert all(len(answer) == script["TOKENS"] for answer in found["answers"])
    assert found["difference"] < 1e-4
    assert all(after <= before for _, before, after in found["losses"])
    names = [name for name, _, _ in found["losses"]]
    assert any("vision" in name for name in names)
    assert any("projector" in name for name in names)
    assert sum("language_model" in name for name in names) == 4
