"""Every installed format, ours and others', passes the tests that authors of formats are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ar_export import formats
from ar_export.testing import FormatConformance, write_model

if TYPE_CHECKING:
    from pathlib import Path


def tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer of 256 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(folder / "tokenizer.json"))


class GgufConformance(FormatConformance):
    """A GGUF file holds its tokenizer; every variant is tried with the scheme it implies."""

    @pytest.fixture
    def model_directory(self, tmp_path: Path) -> Path:
        pytest.importorskip("gguf")
        pytest.importorskip("tokenizers")
        folder = write_model(tmp_path / "float")
        tokenizer(folder)
        return folder

    @classmethod
    def carried(cls, spelling: str) -> list[str]:
        if spelling == "gguf":
            return super().carried(spelling)
        implied = cls.subject.scheme_for(spelling)
        return [name for name in super().carried(spelling) if name == implied]


def case(name: str) -> type:
    """Return the test class of a format."""
    base = GgufConformance if name == "gguf" else FormatConformance
    title = f"Test{name.title().replace('_', '')}"
    return type(title, (base,), {"subject": formats()[name], "__module__": __name__})


globals().update({made.__name__: made for made in map(case, formats())})


def test_every_format_has_a_class_of_its_own() -> None:
    subjects = {c.subject.name for c in globals().values() if getattr(c, "subject", None)}
    assert subjects == set(formats())
