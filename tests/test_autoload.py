"""Checkpoints open without importing ar_kernels, and `import torch` survives whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest

from ar_tuner import AutoRound

INSTALLED = [e for e in metadata.entry_points(group="torch.backends") if e.name == "ar_kernels"]
OPEN = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({path!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, demo_model) -> str:
    out = tmp_path_factory.mktemp("autoload") / "out"
    AutoRound(demo_model, recipe="rtn").quantize_and_save(out)
    return str(out)


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **env},
    )


@pytest.mark.skipif(not INSTALLED, reason="ar-kernels is on the path but not installed")
@pytest.mark.parametrize(
    "first", ["", "import torch", "import transformers.quantizers.auto", "import transformers"]
)
def test_no_import_is_needed(checkpoint, first) -> None:
    done = python(f"{first}\n{OPEN.format(path=checkpoint)}")
    assert done.stdout.strip() == "QuantLinear", done.stderr


@pytest.mark.parametrize("order", ["ar_kernels, transformers", "transformers, ar_kernels"])
def test_an_import_before_or_after_transformers_is_enough(checkpoint, order) -> None:
    done = python(
        f"import {order}\n{OPEN.format(path=checkpoint)}", TORCH_DEVICE_BACKEND_AUTOLOAD="0"
    )
    assert done.stdout.strip() == "QuantLinear", done.stderr


def test_never_means_never(checkpoint) -> None:
    done = python(f"import ar_kernels\n{OPEN.format(path=checkpoint)}", AR_KERNELS_TAKEOVER="never")
    assert "QuantLinear" not in done.stdout


def test_a_failure_inside_does_not_break_import_torch() -> None:
    code = """
import ar_kernels.hf.arm as arm
def broken(**kwargs):
    raise RuntimeError("inside")
arm.arm = broken
import ar_kernels._autoload as a
a.arm = broken
a.autoload()
import torch
print("torch is there")
"""
    assert python(code).stdout.strip() == "torch is there"
