"""A third party's data type, scheme, layout, backend and format, installed and used end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "ar-plugin-nf4"


def python(site: Path, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the plugin is installed."""
    path = os.pathsep.join([str(site), *(p for p in sys.path if p)])
    return subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **env},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--quiet", "--target", str(target), str(EXAMPLE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def checkpoint(site, tmp_path_factory, demo_model) -> Path:
    out = tmp_path_factory.mktemp("nf4") / "out"
    done = python(
        site, "-m", "ar_cli", "quantize", demo_model, "--scheme", "NF4", "--format", "nf4",
        "--recipe", "rtn", "-o", out, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["verified"] is True
    assert facts["bits_per_weight"] == 4.25
    assert facts["layers"] == 28
    return out


def test_every_host_lists_what_it_provides(site) -> None:
    done = python(site, "-m", "ar_cli", "plugins", "--json")
    found = {r["host"]: r for r in json.loads(done.stdout) if r["plugin"] == "nf4"}
    assert {r["from"] for r in found.values()} == {"ar-plugin-nf4 0.1.0"}
    assert found["ar_schemes"]["provides"] == "NF4"
    assert found["ar_kernels"]["provides"] == "nf4, nf4_lookup"
    assert found["ar_export"]["provides"] == "nf4"


def test_inspect_and_verify_know_its_format(site, checkpoint) -> None:
    done = python(site, "-m", "ar_cli", "inspect", checkpoint, "--json")
    facts = json.loads(done.stdout)
    assert facts["format"] == "nf4"
    assert {layer["layout"] for layer in facts["layers"]} == {"nf4"}
    done = python(site, "-m", "ar_cli", "verify", checkpoint, "--against", checkpoint)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "28 compared bit by bit" in done.stdout


def test_what_is_read_back_is_the_rounded_model_and_its_backend_runs(
    site, checkpoint, demo_model
) -> None:
    code = """
import sys
import torch
from transformers import AutoModelForCausalLM
import ar_kernels
from ar_export import open_checkpoint
from ar_kernels import data_type, equal
from ar_schemes import scheme
out, source = map(__import__("pathlib").Path, sys.argv[1:])
found, floats = open_checkpoint(out), open_checkpoint(source)
kind, spec = data_type("nf4"), scheme("NF4").weight
model = AutoModelForCausalLM.from_pretrained(out)
for name in found.quantized:
    weight = floats.tensor(f"{name}.weight")
    made = kind.quantize(weight, spec, kind.parameters(weight, spec))
    assert equal(made, found.weight(name)), name
    layer = model.get_submodule(name)
    assert equal(made, layer.quantized()), name
    assert layer.backend == "nf4_lookup", name
assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
model.save_pretrained(out.parent / "saved")
again = open_checkpoint(out.parent / "saved")
assert again.format == "nf4"
assert all(equal(again.weight(n), found.weight(n)) for n in found.quantized)
print(len(found.quantized))
"""
    done = python(site, "-c", code, checkpoint, demo_model)
    assert done.stdout.strip().endswith("28"), done.stderr


def test_eval_runs_it_and_it_is_close_to_the_float_model(site, checkpoint, demo_model) -> None:
    args = ("--against", demo_model, "--tokens", 2048, "--seqlen", 64, "--json")
    done = python(site, "-m", "ar_cli", "eval", checkpoint, *args)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert 0 < scores["kl"] < 0.03
    assert scores["top1"] > 0.85


def test_tuning_moves_its_codes_to_a_smaller_error(site, tmp_path, demo_model) -> None:
    out = tmp_path / "out"
    done = python(
        site, "-m", "ar_cli", "quantize", demo_model, "--scheme", "NF4", "--format", "nf4",
        "--iters", 20, "--nsamples", 32, "--seqlen", 64, "-o", out, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] is True
    blocks = [line.split() for line in done.stderr.splitlines() if " loss " in line]
    pairs = [(float(w[w.index("->") - 1]), float(w[w.index("->") + 1])) for w in blocks]
    assert len(pairs) == 4
    assert all(after < before for before, after in pairs)


def test_without_the_plugin_the_checkpoint_is_refused_by_the_name_of_its_packing(
    site, checkpoint
) -> None:
    done = python(site, "-m", "ar_cli", "inspect", checkpoint, AR_PLUGINS="")
    assert done.returncode == 2
    assert "auto_round:nf4" in done.stderr


def test_other_formats_refuse_its_scheme_before_work(site, tmp_path, demo_model) -> None:
    args = ("--scheme", "NF4", "--recipe", "rtn", "-o", tmp_path / "out")
    done = python(site, "-m", "ar_cli", "quantize", demo_model, *args, "--format", "auto_round")
    assert done.returncode == 2
    assert "cannot carry 28 layers" in done.stderr
    assert not (tmp_path / "out").exists()


def test_it_passes_the_conformance_tests_that_authors_are_given(site) -> None:
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", EXAMPLE, "--import-mode=importlib")
    done = python(site, "-m", "pytest", *options, EXAMPLE / "tests", PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
