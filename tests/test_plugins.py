"""A third party's distribution, installed, seen and used; a broken one reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent / "plugins" / "ar-plugin-demo"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the plugin installed into it."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--quiet", "--target", str(target), str(DEMO)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def python(site: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *(p for p in sys.path if p)])
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **env},
    )


def records(site: Path, **env: str) -> dict[tuple[str, str], dict[str, str]]:
    done = python(site, "-m", "ar_cli", "plugins", "--json", **env)
    assert done.returncode == 0, done.stderr
    return {(r["host"], r["plugin"]): r for r in json.loads(done.stdout)}


def test_the_plugin_is_listed_with_what_it_provides(site) -> None:
    found = records(site)
    assert found["ar_schemes", "demo"]["from"] == "ar-plugin-demo 1.2.3"
    assert found["ar_schemes", "demo"]["provides"] == "DEMO6"
    assert found["ar_tuner", "demo"]["provides"] == "search_only"
    assert found["ar_cli", "demo"]["provides"] == "greet"


def test_its_command_runs(site) -> None:
    done = python(site, "-m", "ar_cli", "greet")
    assert done.stdout == "hello from a plugin\n"


def test_its_scheme_quantizes_a_real_model(site, tmp_path, demo_model) -> None:
    out = tmp_path / "out"
    done = python(
        site, "-m", "ar_cli", "quantize", str(demo_model), "--scheme", "DEMO6", "--recipe", "rtn",
        "-o", str(out), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["verified"]
    assert facts["bits_per_weight"] == 6.5


def test_its_algorithm_beats_rounding_to_nearest(site) -> None:
    code = """
from ar_tuner.algorithms.base import BlockTask, Target, TuneSettings
from ar_tuner.blocks import WeightRef
from ar_tuner.registry import algorithm
from ar_schemes import scheme
import torch
block = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False))
target = Target(WeightRef("0", "0.weight", False), scheme("W3A16"))
task = BlockTask(block, "b", (target,), None, (), TuneSettings(), lambda *a: None)
def error(name):
    made = algorithm(name).quantize(task).weights["0"].dequantize()
    return float((made - block[0].weight).square().sum().detach())
print(error("search_only") < error("rtn"))
"""
    done = python(site, "-c", code)
    assert done.stdout.strip() == "True", done.stderr


def test_disabled_plugins_are_not_loaded(site) -> None:
    found = records(site, AR_DISABLED_PLUGINS="demo")
    assert {r["status"] for k, r in found.items() if k[1] == "demo"} == {"disabled"}
    assert python(site, "-m", "ar_cli", "greet", AR_PLUGINS="").returncode == 2


def test_a_broken_plugin_is_reported_and_harmless(site, tmp_path) -> None:
    info = tmp_path / "ar_broken-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ar-broken\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[ar_schemes]\nbroken = ar_broken_module\n")
    (tmp_path / "ar_broken_module.py").write_text("raise RuntimeError('no luck')\n")
    both = Path(f"{site}{os.pathsep}{tmp_path}")
    assert python(both, "-m", "ar_cli", "schemes").returncode == 0
    done = python(both, "-m", "ar_cli", "plugins", "--check")
    assert done.returncode == 1
    assert "no luck" in done.stdout
