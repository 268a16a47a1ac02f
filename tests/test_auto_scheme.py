"""A mixed precision from choice to checkpoint, in every kind of format, to a size on disk."""

from __future__ import annotations

import json

import pytest

from ar_export import open_checkpoint, verify
from ar_export.sink import ar_measure_plan
from ar_kernels import equal
from ar_tuner import AutoRound, AutoScheme, TunerError
from ar_tuner.auto_scheme.scorers import Scorer
from ar_tuner.registry import scorer

RTN = {"recipe": "rtn"}
INTEGERS = "W2A16,W4A16,W8A16"


def auto(avg_bits=None, options=INTEGERS, **asked) -> AutoScheme:
    return AutoScheme(avg_bits, options, **{"nsamples": 2, "seqlen": 32, "cache": False} | asked)


def weight_bytes(path) -> int:
    files = [f for f in path.rglob("*") if f.suffix in (".safetensors", ".gguf")]
    return sum(f.stat().st_size for f in files)


@pytest.mark.parametrize(
    ("format", "options", "bits"),
    [
        ("auto_round", INTEGERS, 3.0),
        ("auto_round:gptqmodel", INTEGERS, 3.0),
        ("auto_gptq", INTEGERS, 3.0),
        ("auto_round", "MXFP4,MXFP8", 5.0),
        ("llm_compressor", "W4A16,W8A16", 5.0),
        ("llm_compressor", "NVFP4,MXFP8", 6.0),
        ("fake", INTEGERS, 3.0),
    ],
)
def test_a_choice_is_written_read_and_verified(format, options, bits, demo_model, tmp_path) -> None:
    job = AutoRound(demo_model, scheme=auto(bits, options), nsamples=2, seqlen=32, **RTN)
    _, path = job.quantize_and_save(tmp_path / "out", format)
    assert verify(path).ok
    choice = job.chooser.choices[0]
    assert len(set(choice.picks.values())) > 1
    if format == "fake":
        assert choice.bits <= bits
        return
    assert 0.99 * choice.bytes < weight_bytes(path) <= choice.bytes
    found = open_checkpoint(path)
    for layer, option in choice.picks.items():
        spec = job.chooser.asked.schemes[option].weight
        assert found.quantized[layer].scheme.weight.bits == spec.bits, layer
    if format != "llm_compressor":
        assert choice.bits <= bits


def test_a_saved_plan_gives_the_same_bytes_as_the_choice(demo_model, tmp_path) -> None:
    job = AutoRound(demo_model, scheme=auto(3.0), **RTN)
    _, path = job.quantize_and_save(tmp_path / "one", "auto_round")
    saved = json.loads((tmp_path / "one.run" / "plan.json").read_text())
    front = json.loads((tmp_path / "one.run" / "front.json").read_text())
    assert front["choices"][0]["layers"].items() <= saved.items()
    again = AutoRound(demo_model, scheme="W8A16", layer_config=saved, **RTN)
    _, other = again.quantize_and_save(tmp_path / "two", "auto_round")
    name = "model.safetensors"
    assert (path / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    ("format", "options"),
    # widths of the model are no multiples of 256, as K types need
    [("auto_round", "W4A16,W8A16,W2A16"), ("gguf", "GGUF:Q5_0,GGUF:Q8_0,GGUF:Q4_0")],
)
def test_a_size_is_kept_to_and_used(format, options, demo_model, tmp_path) -> None:
    if format == "gguf":
        pytest.importorskip("gguf")
    size = AutoRound(demo_model, scheme=options.partition(",")[0], **RTN)
    _, uniform = size.quantize_and_save(tmp_path / "uniform", format)
    target = weight_bytes(uniform)
    job = AutoRound(demo_model, scheme=auto(None, options, target_size=target), **RTN)
    _, path = job.quantize_and_save(tmp_path / "out", format)
    assert verify(path).ok
    assert len(set(job.chooser.choices[0].picks.values())) > 1
    # what beside the tensors is in a GGUF file is an estimate
    assert 0.95 * target < weight_bytes(path) <= target * (1.01 if format == "gguf" else 1)


def test_gguf_measures_the_embedding_that_is_the_head_too(demo_model) -> None:
    pytest.importorskip("gguf")
    job = AutoRound(demo_model, scheme=auto(6.0, "GGUF:Q4_0,GGUF:Q8_0"), **RTN)
    job.write_as("gguf")
    plan = job.plan()
    assert plan["model.embed_tokens"].quantized
    assert "model.embed_tokens" in job.chooser.choices[0].picks
    assert plan["model.embed_tokens"].reason == "auto_scheme"


def test_options_that_share_no_file_are_refused_before_scoring(demo_model, tmp_path) -> None:
    job = AutoRound(demo_model, scheme=auto(5.0, "W4A16,MXFP8"), **RTN)
    with pytest.raises(Exception, match="one packing per checkpoint"):
        job.quantize_and_save(tmp_path / "out", "auto_round")
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_the_way_is_found_before_scoring(demo_model, tmp_path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("")
    monkeypatch.setattr(type(scorer("fisher")), "values", lambda *_: pytest.fail("scored"))
    with pytest.raises(Exception, match="is not empty"):
        AutoRound(demo_model, scheme=auto(3.0), **RTN).quantize_and_save(tmp_path / "out")


def test_two_formats_get_one_choice_that_both_can_hold(demo_model, tmp_path) -> None:
    job = AutoRound(demo_model, scheme=auto(4.5, "W3A16,W4A16,W8A16"), **RTN)
    with pytest.raises(TunerError, match="option W3A16 can be given to no layer: awq holds"):
        job.quantize_and_save(tmp_path / "out", ["auto_round", "auto_awq"])
    job = AutoRound(demo_model, scheme=auto(5.0, "W4A16,W8A16"), **RTN)
    _, path = job.quantize_and_save(tmp_path / "out", ["auto_round", "llm_compressor"])
    one, two = (open_checkpoint(p) for p in sorted(path.iterdir()))
    assert all(equal(one.weight(n), two.weight(n)) for n in one.quantized)


def test_scorers_are_what_the_hook_says() -> None:
    assert all(isinstance(scorer(name), Scorer) for name in ("fisher", "delta_loss"))
    assert ar_measure_plan is not None
