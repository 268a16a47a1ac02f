"""The main road on the embedded model: quantize, verify, open, run; killed and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ar_kernels
from ar_export import open_checkpoint, verify
from ar_kernels import QuantLinear, equal
from ar_tuner import AutoRound

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ("--iters", "4", "--nsamples", "16", "--seqlen", "64")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, demo_model) -> tuple[torch.nn.Module, Path]:
    out = tmp_path_factory.mktemp("quantized") / "out"
    job = AutoRound(demo_model, scheme="W4A16", iters=4, nsamples=16, seqlen=64)
    return job.quantize_and_save(out)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.*"))}


def test_the_checkpoint_is_sound(quantized) -> None:
    _, path = quantized
    report = verify(path)
    assert report.ok, report.findings
    assert report.layers == 28


def test_what_was_written_is_what_was_tuned(quantized) -> None:
    model, path = quantized
    checkpoint = open_checkpoint(path)
    for name in checkpoint.quantized:
        tuned = model.get_submodule(name).weight
        assert torch.equal(checkpoint.weight(name).dequantize(tuned.dtype), tuned), name


def test_transformers_opens_it_and_computes_the_same(quantized) -> None:
    model, path = quantized
    opened = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert sum(isinstance(m, QuantLinear) for m in opened.modules()) == 28
    ids = torch.randint(0, 1000, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = opened(ids).logits.float()
        theirs = model(ids).logits.float()
    assert float((ours - theirs).abs().max()) <= 0.04 * float(theirs.abs().max())


def test_it_generates_and_saves_the_same_tensors(quantized, tmp_path) -> None:
    _, path = quantized
    opened = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer("Return the", return_tensors="pt")
    out = opened.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert out.shape[1] == inputs.input_ids.shape[1] + 8
    opened.save_pretrained(tmp_path)
    first, second = open_checkpoint(path), open_checkpoint(tmp_path)
    assert set(first.names) == set(second.names)
    assert all(equal(first.weight(n), second.weight(n)) for n in first.quantized)


def test_torch_compile_gives_the_same_logits(quantized) -> None:
    _, path = quantized
    opened = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.randint(0, 1000, (1, 16), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(opened, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(ids).logits, opened(ids).logits)


def test_equal_seeds_give_equal_bytes(quantized, tmp_path, demo_model) -> None:
    _, path = quantized
    torch.manual_seed(123)  # the global state must not matter
    job = AutoRound(demo_model, scheme="W4A16", iters=4, nsamples=16, seqlen=64)
    _, again = job.quantize_and_save(tmp_path / "again")
    assert digests(again) == digests(path)


def test_tuning_beats_rounding_to_nearest(tmp_path, demo_model) -> None:
    from ar_cli.opening import open_model, open_tokenizer
    from ar_tuner.evaluate import compare, windows

    text = (demo_model.parent / "eval.txt").read_text()
    ids = windows(open_tokenizer(demo_model), text, seqlen=128, tokens=8192)
    reference = open_model(demo_model, "float32")
    kl = {}
    for recipe, numbers in (
        ("rtn", {}),
        ("default", {"iters": 30, "nsamples": 32, "seqlen": 128}),
    ):
        job = AutoRound(demo_model, scheme="W3A16", recipe=recipe, **numbers)
        _, path = job.quantize_and_save(tmp_path / recipe)
        kl[recipe] = compare(reference, open_model(path, "float32"), ids).kl
    assert kl["default"] < 0.7 * kl["rtn"]


def test_mixed_bits_and_a_quantized_head_come_back(tmp_path, demo_model) -> None:
    job = AutoRound(
        demo_model,
        scheme="W4A16",
        recipe="rtn",
        layer_config={"down_proj": {"bits": 8}, "layers.1.mlp.up_proj": "BF16"},
        ignore_layers="layers.0.self_attn.o_proj",
    )
    _, path = job.quantize_and_save(tmp_path / "mixed")
    assert verify(path).ok
    entries = open_checkpoint(path).quantized
    assert entries["model.layers.2.mlp.down_proj"].scheme.weight.bits == 8
    assert "model.layers.1.mlp.up_proj" not in entries
    assert "model.layers.0.self_attn.o_proj" not in entries
    opened = AutoModelForCausalLM.from_pretrained(path)
    assert isinstance(opened.model.layers[1].mlp.up_proj, torch.nn.Linear)
    assert opened.model.layers[2].mlp.down_proj.spec.bits == 8


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16", "W5A16", "W8A16"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_every_width_comes_back_to_the_bit(tmp_path, demo_model, scheme, sym) -> None:
    job = AutoRound(demo_model, scheme=scheme, sym=sym, recipe="rtn")
    reports = []
    job.quantize_and_save(
        tmp_path / "out",
        check=lambda path, weight_of, model: reports.append(
            verify(path, expected=weight_of, against=model)
        ),
    )
    assert reports[0].ok, reports[0].findings
    assert reports[0].compared == 28


def test_a_killed_run_resumes_to_the_same_bytes(ar, tmp_path, demo_model) -> None:
    whole = ar("quantize", demo_model, "-o", tmp_path / "whole", *QUICK, "--no-verify")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "ar_cli", "quantize", str(demo_model), *QUICK]
    command += ["-o", str(tmp_path / "killed"), "--no-verify"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, cwd=tmp_path)
    journal = tmp_path / "killed.run" / "journal.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if journal.is_file() and journal.read_text().count("\n") >= 1:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed").exists(), "the run ended before it could be killed"
    again = ar("quantize", demo_model, "-o", tmp_path / "killed", *QUICK, "--no-verify")
    assert again.returncode == 2
    assert "interrupted run" in again.stderr
    resumed = ar(
        "quantize", demo_model, "-o", tmp_path / "killed", *QUICK, "--no-verify", "--resume"
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "already done" in resumed.stderr
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    log = (tmp_path / "killed.run" / "events.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["kind"] == "run_finished"


def test_a_run_with_other_settings_is_not_resumed(ar, tmp_path, demo_model) -> None:
    calls = []

    class Stop(RuntimeError):
        pass

    def stop_after_one(event) -> None:
        calls.append(event.kind)
        if event.kind == "block_started" and event.index == 1:
            raise Stop

    job = AutoRound(demo_model, iters=2, nsamples=8, seqlen=32, on_event=stop_after_one)
    with pytest.raises(Stop):
        job.quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    other = AutoRound(demo_model, iters=3, nsamples=8, seqlen=32, resume=True)
    with pytest.raises(ar_kernels.KernelError.__bases__[0], match=r"settings.* differ"):
        other.quantize_and_save(tmp_path / "out")


def test_the_demo_prints_one_table(ar, tmp_path) -> None:
    done = ar("quantize", "--demo", "--out", tmp_path / "d", "--iters", 2, "--nsamples", 8)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == ["float", "round to nearest", "tuned"]
    assert "verified: bits and logits" in done.stdout
    assert " generate " in done.stdout
