"""Another format for the same codes; what differs between two checkpoints."""

from __future__ import annotations

import json

import pytest

from ar_export import ExportError, compare_checkpoints, convert, open_checkpoint, verify
from ar_kernels import equal
from ar_tuner import AutoRound

INTEGERS = ("auto_round", "auto_gptq", "auto_gptq:gptq_v2", "auto_awq", "llm_compressor")


@pytest.fixture(scope="module")
def made(tmp_path_factory, demo_model):
    """Return a function that gives a checkpoint of a scheme and a format, made once."""
    kept: dict[tuple[str, ...], object] = {}

    def get(scheme: str, format: str, **options: object):
        key = (scheme, format, *map(str, options.items()))
        if key not in kept:
            out = tmp_path_factory.mktemp("made") / "out"
            job = AutoRound(demo_model, scheme=scheme, recipe="rtn", **options)
            kept[key] = job.quantize_and_save(out, format)[1]
        return kept[key]

    return get


def assert_same_weights(a, b) -> None:
    one, two = open_checkpoint(a), open_checkpoint(b)
    assert one.quantized.keys() == two.quantized.keys()
    for name in one.quantized:
        assert equal(one.weight(name), two.weight(name)), name


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_integer_formats_convert_there_and_back(made, tmp_path, to, sym) -> None:
    first = made("W4A16", "auto_round", sym=sym)
    path = convert(first, tmp_path / "there", to)
    assert_same_weights(first, path)
    report = verify(path)
    assert report.ok, report.findings
    assert compare_checkpoints(first, path).same
    assert_same_weights(first, convert(path, tmp_path / "back", "auto_round"))


@pytest.mark.parametrize(("bits", "variant"), [(4, "q4_0"), (8, "q8_0")])
def test_groups_of_32_convert_to_gguf_and_back(made, tmp_path, bits, variant) -> None:
    first = made(f"W{bits}A16G32", "auto_round")
    path = convert(first, tmp_path / "there", f"gguf:{variant}")
    assert [p.suffix for p in path.glob("*.gguf")] == [".gguf"]
    assert_same_weights(first, path)
    assert_same_weights(first, convert(path, tmp_path / "back", "auto_gptq"))


@pytest.mark.parametrize(
    ("scheme", "format", "to", "why"),
    [
        ("W3A16", "auto_round", "auto_awq", "4 bits"),
        ("W4A16", "auto_round", "gguf:q4_0", "no type for int4 group128"),
        ("MXFP4", "auto_round", "auto_gptq", "holds int|quantized activations"),
        ("GGUF:Q6_K", "gguf:q6_k", "auto_round", "int_sym_dq"),
    ],
)
def test_what_is_not_exact_is_refused(made, tmp_path, scheme, format, to, why) -> None:
    first = made(scheme, format)
    with pytest.raises(ExportError, match=why):
        convert(first, tmp_path / "there", to)
    assert not (tmp_path / "there").exists()


def test_a_float_checkpoint_is_not_converted(demo_model, tmp_path) -> None:
    with pytest.raises(ExportError, match="no quantized layer"):
        convert(demo_model, tmp_path / "out", "auto_gptq")


def test_differences_are_named(made, demo_model) -> None:
    four, three = made("W4A16", "auto_round"), made("W3A16", "auto_round")
    found = compare_checkpoints(four, three)
    assert len(found.differences) == found.layers == 28
    assert all(d.largest for d in found.differences)
    against = compare_checkpoints(four, demo_model)
    assert all("quantized in" in d.what for d in against.differences)


def test_the_commands(made, ar, tmp_path) -> None:
    first = made("W4A16", "auto_round")
    done = ar("convert", first, "--to", "llm_compressor", "-o", tmp_path / "ct", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "llm_compressor"
    assert ar("compare", first, tmp_path / "ct").returncode == 0
    third = made("W3A16", "auto_round")
    differ = ar("compare", first, third, "--json")
    assert differ.returncode == 1
    assert json.loads(differ.stdout)["same"] is False
    refused = ar("convert", first, "--to", "gguf:q4_0", "-o", tmp_path / "no")
    assert refused.returncode == 2
    assert "int4 group128" in refused.stderr
