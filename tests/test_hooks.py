"""One plugin implements every hook of every host: each is called, and does what it is for."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ar_cli.hookspecs
import ar_export.hookspecs
import ar_kernels.hookspecs
import ar_schemes.hookspecs
import ar_tuner.hookspecs

if TYPE_CHECKING:
    from types import ModuleType

PLUGIN = Path(__file__).parent / "plugins" / "ar_every_hook.py"
HOSTS: dict[str, ModuleType] = {
    "ar_schemes": ar_schemes.hookspecs,
    "ar_kernels": ar_kernels.hookspecs,
    "ar_tuner": ar_tuner.hookspecs,
    "ar_export": ar_export.hookspecs,
    "ar_cli": ar_cli.hookspecs,
}
HOOKS = {
    name: function
    for module in HOSTS.values()
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if name.startswith("ar_")
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the plugin says of itself, in a process where it is installed and strictness is on."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(PLUGIN, site)
    info = site / "ar_every-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ar-every\nVersion: 1\n")
    points = "".join(f"[{host}]\nevery = ar_every_hook\n" for host in HOSTS)
    (info / "entry_points.txt").write_text(points)
    path = os.pathsep.join([str(site), *(p for p in sys.path if p)])
    done = subprocess.run(
        [sys.executable, "-m", "ar_every_hook"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "AR_PLUGINS_STRICT": "1", "AR_PLUGINS": "every"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_hook_has_a_test_here() -> None:
    functions = [n.name for n in ast.parse(Path(__file__).read_text("utf-8")).body if _named(n)]
    assert {f"test_hook_{name}" for name in HOOKS} <= set(functions)


def test_every_hook_says_what_it_is_for_and_has_types() -> None:
    for name, function in HOOKS.items():
        assert function.__doc__, name
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, name
        assert all(p.annotation is not p.empty for p in signature.parameters.values()), name
        if name.startswith("ar_register_"):
            assert not signature.parameters, f"{name}: a registration takes nothing"


def test_hook_ar_register_schemes(report) -> None:
    assert report["ar_register_schemes"] == "every_int"


def test_hook_ar_register_data_types(report) -> None:
    assert report["ar_register_data_types"] == "every_int"


def test_hook_ar_register_layouts(report) -> None:
    assert report["ar_register_layouts"] == "every_layout"


def test_hook_ar_register_backends(report) -> None:
    assert report["ar_register_backends"] == "every_backend"


def test_hook_ar_choose_backend(report) -> None:
    assert report["ar_choose_backend"] == "every_backend"
    assert "ar_choose_backend" in report["heard"]


def test_hook_ar_register_algorithms(report) -> None:
    assert report["ar_register_algorithms"] == "every_algorithm"
    assert report["stage"] == ["every_stage", "every_stage"]


def test_hook_ar_register_datasets(report) -> None:
    assert report["ar_register_datasets"] == ["train text"]


def test_hook_ar_register_scorers(report) -> None:
    assert report["ar_register_scorers"] == "every_scorer"


def test_hook_ar_measure_plan(report) -> None:
    assert report["ar_measure_plan"] == len("plan") + 1


def test_hook_ar_find_adapter(report) -> None:
    assert report["ar_find_adapter"] == "every-config"


def test_hook_ar_open_source(report) -> None:
    assert report["ar_open_source"] == "floats of a directory"


def test_hook_ar_open_sink(report) -> None:
    assert report["ar_open_sink"] == "a sink"


def test_hook_ar_scheme_for_format(report) -> None:
    assert report["ar_scheme_for_format"] == "EVERY4"


def test_hook_ar_adjust_plan(report) -> None:
    assert report["ar_adjust_plan"] == "plan for every"


def test_hook_ar_run_event(report) -> None:
    assert "ar_run_event hello" in report["heard"]


def test_hook_ar_register_formats(report) -> None:
    assert report["ar_register_formats"] == "every_format"


def test_hook_ar_register_commands(report) -> None:
    assert report["ar_register_commands"] == "every"


def _named(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef)
