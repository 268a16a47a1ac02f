"""Damaged and hostile checkpoints: a clear error, never a crash, a hang or a wrong number."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import struct
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from ar_export import ExportError, open_checkpoint, verify
from ar_export import format as find_format
from ar_export.sink import ar_open_sink
from ar_export.testing import LAYERS, ExampleRequest, example_weights, float_tensors, write_model
from ar_schemes import LayerRules, make_plan, scheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYER = "model.layers.0.self_attn.q_proj"
KINDS = (
    ("auto_round", "W4A16"),
    ("auto_round", "MXFP4"),
    ("auto_round", "FP8_STATIC"),
    ("auto_gptq", "W3A16"),
    ("auto_awq", "W4A16"),
    ("llm_compressor", "W4A16"),
    ("llm_compressor", "INT8"),
    ("llm_compressor", "NVFP4"),
    ("llm_compressor", "MXFP8"),
    ("fp8", "FP8_BLOCK"),
    ("mlx", "W6A16"),
)
IDS = [f"{form}-{name}" for form, name in KINDS]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a sound checkpoint, once for each kind."""
    folder = tmp_path_factory.mktemp("sound")
    model = write_model(folder / "float")
    kept: dict[tuple[str, str], Path] = {}

    def get(form: str, name: str, *, shard: int = 10**9) -> Path:
        key = (form, f"{name}-{shard}")
        if key not in kept:
            ignored = ("gate_proj", "up_proj", "lm_head")
            plan = make_plan(LAYERS, LayerRules(scheme(name), ignore_layers=ignored))
            adjust = getattr(find_format(form), "adjust", None)
            plan = plan if adjust is None else adjust(form, plan, {"dtype": "bfloat16"})
            output = folder / "-".join(key).replace(":", "_")
            sink = ar_open_sink(ExampleRequest(output, plan, form, model, max_shard_bytes=shard))
            assert sink is not None
            for layer, weight in example_weights(plan).items():
                sink.put(layer, weight)
            for tensor, value in float_tensors(plan).items():
                sink.put_tensor(tensor, value)
            kept[key] = sink.commit()
        return kept[key]

    return get


@pytest.fixture
def copied(original, tmp_path) -> Callable[..., Path]:
    """Return a function that gives a copy to damage."""

    def get(form: str = "auto_round", name: str = "W4A16", **options: int) -> Path:
        number = len(list(tmp_path.iterdir()))
        return shutil.copytree(original(form, name, **options), tmp_path / str(number))

    return get


def complaints(path: Path) -> str:
    """Return what `verify` says; it must not be content."""
    report = verify(path)
    assert not report.ok
    return "\n".join(f"{f.where}: {f.what}" for f in report.findings)


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def needed(path: Path) -> list[str]:
    """Return the tensors that a quantized layer cannot do without."""
    from ar_kernels import layout

    entry = open_checkpoint(path).quantized[LAYER]
    assert entry.scheme.weight is not None
    facts = layout(entry.layout).facts(entry.scheme.weight, entry.rows, entry.columns)
    # without g_idx channels are in their own order, which it says here too
    return [f"{LAYER}.{suffix}" for suffix in facts if suffix != "g_idx"]


@pytest.mark.parametrize(("form", "name"), KINDS, ids=IDS)
def test_a_missing_tensor_is_named(copied, form, name) -> None:
    path = copied(form, name)
    whole = load_file(path / "model.safetensors")
    for key in needed(path):
        rest = {k: v for k, v in whole.items() if k != key}
        save_file(rest, path / "model.safetensors", metadata={"format": "pt"})
        assert LAYER in complaints(path), key


@pytest.mark.parametrize(("form", "name"), KINDS, ids=IDS)
def test_a_tensor_of_another_type_is_found(copied, form, name) -> None:
    path = copied(form, name)
    whole = load_file(path / "model.safetensors")
    for key in needed(path):
        other = torch.float64 if whole[key].dtype.is_floating_point else torch.int16
        wrong = {**whole, key: torch.zeros(whole[key].shape, dtype=other)}
        save_file(wrong, path / "model.safetensors", metadata={"format": "pt"})
        assert LAYER in complaints(path), key


@pytest.mark.parametrize(("form", "name"), KINDS, ids=IDS)
def test_a_tensor_of_another_shape_is_found(copied, form, name) -> None:
    path = copied(form, name)
    whole = load_file(path / "model.safetensors")
    for key in needed(path):
        for shape in ((0,), (3, 5), (1, 1, 1), (2, *whole[key].shape)):
            wrong = {**whole, key: torch.zeros(shape, dtype=whole[key].dtype)}
            save_file(wrong, path / "model.safetensors", metadata={"format": "pt"})
            assert LAYER in complaints(path), (key, shape)


@pytest.mark.parametrize("cut", [0, 3, 8, 100, -1])
def test_a_file_that_was_cut_is_named(copied, cut) -> None:
    path = copied()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    assert "is not a whole safetensors file" in complaints(path)


def with_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Write the file anew with a header that says something else of the same data."""
    file = path / "model.safetensors"
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


ABSURD: dict[str, Callable[[dict[str, Any]], object]] = {
    "huge": lambda h: h[f"{LAYER}.qweight"].update(shape=[2**40, 2**40]),
    "negative": lambda h: h[f"{LAYER}.qweight"].update(shape=[-1, 64]),
    "many dimensions": lambda h: h[f"{LAYER}.qweight"].update(shape=[1] * 99),
    "no numbers": lambda h: h[f"{LAYER}.qweight"].update(shape=["a"]),
    "offsets beyond": lambda h: h[f"{LAYER}.qweight"].update(data_offsets=[0, 2**60]),
    "offsets reversed": lambda h: h[f"{LAYER}.qweight"].update(data_offsets=[64, 0]),
    "unknown type": lambda h: h[f"{LAYER}.qweight"].update(dtype="I7"),
    "no offsets": lambda h: h[f"{LAYER}.qweight"].pop("data_offsets"),
}


@pytest.mark.parametrize("edit", ABSURD.values(), ids=ABSURD)
def test_a_header_that_lies_is_refused(copied, edit) -> None:
    path = copied()
    with_header(path, edit)
    assert complaints(path)


def test_a_header_longer_than_the_file_is_refused(copied) -> None:
    path = copied()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "is not a whole safetensors file" in complaints(path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


def test_a_pickle_under_another_name_is_not_opened(copied, capsys) -> None:
    path = copied()
    (path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert "is not a whole safetensors file" in complaints(path)
    assert "unpickled" not in capsys.readouterr().out


TRICKS = (
    *("../model.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "..", ".", "", "C:\\x"),
    *("a\0b", "x" * 300, "config.json", "nothing.safetensors"),
)


@pytest.mark.parametrize("name", TRICKS, ids=[repr(t)[:24] for t in TRICKS])
def test_an_index_names_files_beside_it_or_is_refused(copied, name) -> None:
    path = copied(shard=100_000)
    index = path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(document))
    assert complaints(path)
    with pytest.raises(ExportError):
        open_checkpoint(path)


@pytest.mark.parametrize("value", [None, [], "x", {"a": 1}, {"a": None}, {"a": ["b"]}])
def test_an_index_of_another_form_is_refused(copied, value) -> None:
    path = copied(shard=100_000)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    assert complaints(path)


def test_a_side_file_that_is_no_json_is_found(copied) -> None:
    path = copied()
    (path / "quantization_config.json").write_text("{")
    assert "quantization_config.json" in complaints(path)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto-round", "int", "group", "re:(", "*", "torch.uint8", "mx_fp"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    out = []
    for key, child in inner:
        out.append((*path, key))
        if isinstance(child, (dict, list)):
            out += places(child, (*path, key))
    return out


@pytest.mark.parametrize(("form", "name"), KINDS, ids=IDS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_config_is_read_or_refused(original, tmp_path, form, name, data) -> None:
    sound = original(form, name)
    path = tmp_path / "fuzzed"
    if not path.exists():
        shutil.copytree(sound, path)
    config = json.loads((sound / "config.json").read_text())
    quantization = copy.deepcopy(config["quantization_config"])
    for way in data.draw(st.lists(st.sampled_from(places(quantization)), min_size=1, max_size=2)):
        holder: Any = quantization
        try:
            for key in way[:-1]:
                holder = holder[key]
            holder[way[-1]] = data.draw(JUNK)
        except (KeyError, IndexError, TypeError):  # the first change removed it
            continue
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    try:
        found = open_checkpoint(path)
    except ExportError:
        assert not verify(path).ok
        return
    assert verify(path).layers == len(found.quantized)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.integers(0, 2500), value=st.integers(0, 255), count=st.integers(1, 4))
def test_any_header_is_read_or_refused(original, tmp_path, where, value, count) -> None:
    sound = original("auto_round", "W4A16")
    path = tmp_path / "fuzzed"
    if not path.exists():
        shutil.copytree(sound, path)
    raw = bytearray((sound / "model.safetensors").read_bytes())
    for i in range(count):
        raw[(where * (i + 1)) % 2500] = (value + i) % 256
    (path / "model.safetensors").write_bytes(raw)
    assert verify(path).findings is not None
