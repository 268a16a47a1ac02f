"""Who loads a checkpoint: us or the stock route. Each case runs in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

METHOD = """
import sys, transformers.quantizers.auto as auto
config = {"quant_method": METHOD, "bits": 4, "group_size": 32, "sym": True}
made = auto.AutoHfQuantizer.from_config(dict(config))
print(type(made).__module__.split(".")[0])
"""


def run(code: str, *, stock: tuple[str, ...] = (), folder=None, **env: str) -> str:
    """Return what `code` prints; packages named in `stock` are there, empty."""
    paths = [p for p in sys.path if p]
    for name in stock:
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
        paths.insert(0, str(folder))
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **off, "PYTHONPATH": os.pathsep.join(paths), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def opening(first: str, method: str = "auto-round") -> str:
    return f"{first}\n{METHOD.replace('METHOD', repr(method))}"


# What torch does at the end of `import torch` when ar-kernels is installed.
AUTOLOAD = """
import torch
torch.__spec__._initializing = True
import ar_kernels._autoload as entry
entry.autoload()
torch.__spec__._initializing = False
del entry
"""


def test_autoload_takes_what_the_stock_route_cannot_load() -> None:
    assert run(opening(AUTOLOAD)) == "ar_kernels"


def test_autoload_leaves_what_an_installed_package_loads(tmp_path) -> None:
    code = opening(AUTOLOAD) + "print('ar_kernels' in sys.modules)"
    assert run(code, stock=("auto_round",), folder=tmp_path).split() == ["transformers", "False"]


@pytest.mark.parametrize(
    "first",
    [
        "import ar_kernels",
        AUTOLOAD + "import ar_kernels",
        AUTOLOAD + "import transformers.modeling_utils, ar_kernels",
        "import transformers.modeling_utils, ar_kernels",
        AUTOLOAD + "from ar_kernels.linear import QuantLinear",
    ],
    ids=["alone", "after-torch", "after-transformers", "no-autoload", "submodule"],
)
def test_an_explicit_import_takes_over_whenever_it_comes(tmp_path, first) -> None:
    assert run(opening(first), stock=("auto_round",), folder=tmp_path) == "ar_kernels"


def test_opening_by_itself_is_no_explicit_import(tmp_path) -> None:
    code = opening(AUTOLOAD, "gptq") + METHOD.replace("METHOD", "'auto-round'")
    found = run(code, stock=("auto_round",), folder=tmp_path)
    assert found.split() == ["ar_kernels", "transformers"]


def test_the_environment_decides_over_both(tmp_path) -> None:
    code = opening(AUTOLOAD)
    always = run(code, stock=("auto_round",), folder=tmp_path, AR_KERNELS_TAKEOVER="always")
    assert always == "ar_kernels"
    assert run(opening("import ar_kernels"), AR_KERNELS_TAKEOVER="never") == "transformers"


def test_an_unknown_policy_is_named_and_counts_as_auto() -> None:
    code = "import logging\nlogging.basicConfig(stream=__import__('sys').stdout)\n"
    found = run(opening(code + AUTOLOAD), AR_KERNELS_TAKEOVER="sometimes")
    assert "AR_KERNELS_TAKEOVER=sometimes is none of auto, always, never" in found
    assert found.endswith("ar_kernels")


def test_transformers_without_the_parts_we_need_still_imports() -> None:
    code = (
        "import sys\nsys.modules['transformers.core_model_loading'] = None\n"
        "import ar_kernels\n"
        "from ar_kernels.hf import arm\n"
        "class Home: AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING = {}, {}\n"
        "arm.__globals__['sys'].modules['transformers.quantizers.auto'] = Home\n"
        "arm.__globals__['_register'](True)\n"
        "print(sorted(Home.AUTO_QUANTIZER_MAPPING))"
    )
    assert run(code) == "['auto-round', 'awq', 'compressed-tensors', 'fp8', 'gptq', 'mxfp4']"


def test_watching_twice_registers_once() -> None:
    code = (
        "import sys, ar_kernels\nfrom ar_kernels.hf import arm\narm(); arm(explicit=False)\n"
        "print(sum(type(f).__module__ == 'ar_kernels.hf.arm' for f in sys.meta_path))\n"
        "import transformers.quantizers.auto\n"
        "print(sum(type(f).__module__ == 'ar_kernels.hf.arm' for f in sys.meta_path))"
    )
    assert run(code).split() == ["1", "0"]
