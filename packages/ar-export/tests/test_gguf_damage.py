"""Damaged GGUF files: a clear error, never a crash or a hang."""

from __future__ import annotations

import shutil
import struct
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from ar_export import ExportError, open_checkpoint, verify
from ar_export.sink import ar_open_sink
from ar_export.testing import LAYERS, ExampleRequest, example_weights, float_tensors, write_model
from ar_schemes import LayerRules, make_plan, scheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("gguf")
    model = write_model(folder / "float")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(model / "tokenizer.json"))
    plan = make_plan(LAYERS, LayerRules(scheme("GGUF:Q4_K_S"), ignore_layers=("lm_head",)))
    sink = ar_open_sink(ExampleRequest(folder / "out", plan, "gguf:q4_k_s", model))
    assert sink is not None
    for layer, weight in example_weights(plan).items():
        sink.put(layer, weight)
    for name, tensor in float_tensors(plan).items():
        sink.put_tensor(name, tensor)
    return sink.commit()


@pytest.fixture
def damaged(original, tmp_path) -> Callable[[Callable[[bytearray], object]], Path]:
    """Return a function that gives a copy with other bytes."""

    def make(edit: Callable[[bytearray], object]) -> Path:
        path = tmp_path / "copy"
        if not path.exists():
            shutil.copytree(original, path)
        raw = bytearray(next(original.glob("*.gguf")).read_bytes())
        edit(raw)
        next(path.glob("*.gguf")).write_bytes(raw)
        return path

    return make


def number(at: int, value: int, size: str = "<Q") -> Callable[[bytearray], object]:
    return lambda raw: raw.__setitem__(
        slice(at, at + struct.calcsize(size)), struct.pack(size, value)
    )


def longer_array(raw: bytearray) -> None:
    key = b"tokenizer.ggml.token_type"
    struct.pack_into("<Q", raw, raw.index(key) + len(key) + 8, 2**40)


BROKEN: dict[str, Callable[[bytearray], object]] = {
    "empty": lambda raw: raw.clear(),
    "no header": lambda raw: raw.__delitem__(slice(5, None)),
    "cut in the header": lambda raw: raw.__delitem__(slice(200, None)),
    "cut in the data": lambda raw: raw.__delitem__(slice(-5000, None)),
    "other magic": number(0, 0x46554747 + 1, "<I"),
    "other version": number(4, 77, "<I"),
    "tensors beyond the file": number(8, 2**60),
    "keys beyond the file": number(16, 2**60),
    "a key of 2**60 bytes": number(24, 2**60),
    "an array of 2**40 numbers": longer_array,
}


@pytest.mark.parametrize("edit", BROKEN.values(), ids=BROKEN)
def test_a_damaged_file_is_named(damaged, edit) -> None:
    path = damaged(edit)
    with pytest.raises(ExportError, match="is not a whole GGUF file"):
        open_checkpoint(path)
    report = verify(path)
    assert not report.ok
    assert ".gguf" in report.findings[0].what


def test_a_quantized_tensor_that_is_no_weight_is_named(damaged) -> None:
    def rename(raw: bytearray) -> None:
        at = raw.index(b"blk.0.ffn_gate.weight") + len("blk.0.ffn_gate.")
        raw[at : at + 6] = b"\x03eight"

    report = verify(damaged(rename))
    assert "but no layer's weight" in report.findings[0].what


def test_a_sound_file_is_sound(original) -> None:
    report = verify(original)
    assert report.ok, report.findings
    assert report.layers == 7


def test_two_files_or_none_are_refused(original, tmp_path) -> None:
    path = shutil.copytree(original, tmp_path / "copy")
    file = next(path.glob("*.gguf"))
    shutil.copy(file, path / "other.gguf")
    with pytest.raises(ExportError, match="one GGUF file is needed, found"):
        open_checkpoint(path)
    with pytest.raises(ExportError, match="one GGUF file is needed, found nothing.gguf"):
        open_checkpoint(path / "nothing.gguf")


def test_a_file_without_its_config_is_refused(original, tmp_path) -> None:
    path = shutil.copytree(original, tmp_path / "copy")
    (path / "config.json").unlink()
    with pytest.raises(ExportError, match=r"config\.json must lie beside it"):
        open_checkpoint(path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.integers(0, 12_000), value=st.integers(0, 255), count=st.integers(1, 4))
def test_any_file_is_read_or_refused(damaged, where, value, count) -> None:
    def edit(raw: bytearray) -> None:
        for i in range(count):
            raw[(where * (i + 1)) % len(raw)] = (value + i) % 256

    assert verify(damaged(edit)).findings is not None
