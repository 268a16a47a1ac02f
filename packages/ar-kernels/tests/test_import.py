"""What importing does and does not do. Each case runs in an interpreter of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ar_kernels


def run(code: str, **env: str) -> str:
    """Return what `code` prints."""
    path = os.pathsep.join(p for p in sys.path if p)
    full = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        [sys.executable, "-c", code], env=full, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_neither_transformers_nor_pytest_nor_plugins() -> None:
    code = (
        "import sys, ar_kernels\n"
        "heavy = {'transformers', 'pytest', 'hypothesis', 'safetensors', 'triton', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)), ar_kernels.host().records[1:])"
    )
    assert run(code) == "[] ()"


def test_every_public_name_is_there() -> None:
    missing = [name for name in ar_kernels.__all__ if not hasattr(ar_kernels, name)]
    assert missing == []
    assert sorted(ar_kernels.__all__) == ar_kernels.__all__


def test_the_version_is_that_of_the_distribution() -> None:
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    found = re.search(r'^version = "(.+)"$', pyproject.read_text(), re.MULTILINE)
    assert found is not None
    assert ar_kernels.__version__ == found[1]


def test_functions_win_over_subpackages_of_the_same_name() -> None:
    code = (
        "from ar_kernels.layouts.gptq import GPTQ\n"
        "from ar_kernels.backends.select import choose\n"
        "import ar_kernels\n"
        "print(GPTQ.name in ar_kernels.layouts(), 'dense' in ar_kernels.backends())"
    )
    assert run(code) == "True True"


@pytest.mark.parametrize(
    ("policy", "watching"), [("never", "False"), ("always", "True"), ("", "True")]
)
def test_ar_kernels_takeover_never_leaves_transformers_alone(policy: str, watching: str) -> None:
    code = (
        "import sys, ar_kernels\n"
        "print(any(type(f).__module__.startswith('ar_kernels') for f in sys.meta_path))"
    )
    assert run(code, AR_KERNELS_TAKEOVER=policy) == watching


def test_a_weight_can_be_quantized_packed_and_read_without_transformers() -> None:
    code = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "import torch, ar_kernels\n"
        "from ar_schemes import scheme\n"
        "spec = scheme('W4A16').weight\n"
        "numbers, weight = ar_kernels.data_type(spec.data_type), torch.randn(32, 128)\n"
        "q = numbers.quantize(weight, spec, numbers.parameters(weight, spec))\n"
        "tensors = ar_kernels.layout('gptq').pack(q)\n"
        "print(ar_kernels.equal(ar_kernels.layout('gptq').unpack(tensors, spec, 32, 128), q))"
    )
    assert run(code) == "True"
