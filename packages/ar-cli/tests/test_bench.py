"""`ar bench` on the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ar_cli

DEMO = Path(ar_cli.__file__).parent / "demo" / "model"


def test_bench_tells_speed_memory_and_backends(ar, rtn) -> None:
    load = ("--prompt-tokens", 8, "--new-tokens", 2, "--repeat", 1)
    found = json.loads(ar("bench", rtn, *load, "--json").stdout)
    assert sum(found["backends"].values()) == 28
    assert found["decode_tokens_per_second"] * found["milliseconds_per_token"] == pytest.approx(1e3)
    assert found["prefill_tokens_per_second"] > 0
    assert found["peak_bytes"] > 10**7
    table = ar("bench", rtn, *load, "--against", DEMO).stdout
    assert "writing, tokens per second" in table
    assert "none" in table  # the float model has no quantized layers
    wrong = ar("bench", rtn, *load, "--against", rtn / "nothing")
    assert wrong.exit_code == 2
    assert "--against" in wrong.output


def test_bench_sets_the_compiled_model_beside_the_plain_one(ar, rtn) -> None:
    load = ("--prompt-tokens", 8, "--new-tokens", 2, "--repeat", 1)
    compiled = ("bench", rtn, *load, "--compile", "--compile-backend", "eager")
    found = json.loads(ar(*compiled, "--json").stdout)
    assert sum(found["this"]["backends"].values()) == 28
    assert found["compiled"]["whole_graphs"] is True
    assert found["compiled"]["compile_seconds"] > 0
    assert found["compiled"]["decode_tokens_per_second"] > 0
    table = ar(*compiled).stdout
    assert "time to compile" in table
    assert "one graph each" in table


def test_bench_refuses_to_compile_where_nothing_can_be(ar, rtn, tmp_path) -> None:
    unknown = ar("bench", rtn, "--compile", "--compile-backend", "nonsense")
    assert unknown.exit_code == 2
    assert "nonsense" in unknown.output
    both = ar("bench", rtn, "--compile", "--against", DEMO)
    assert both.exit_code == 2
    assert "--against" in both.output
    # in a process of its own, because torch keeps for good which compiler it found
    environment = {
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    without = subprocess.run(
        [sys.executable, "-m", "ar_cli", "bench", str(rtn), "--compile"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert without.returncode == 2
    assert "InvalidCxxCompiler" in without.stderr
    assert "CXX" in without.stderr
    assert "Traceback" not in without.stderr
