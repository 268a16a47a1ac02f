"""Dependencies point one way, rooms stay small, imports stay light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "ar_schemes": set(),
    "ar_kernels": {"ar_schemes"},
    "ar_tuner": {"ar_schemes", "ar_kernels"},
    "ar_export": {"ar_schemes", "ar_kernels"},
    "ar_vlm": {"ar_schemes", "ar_kernels", "ar_tuner"},
    "ar_cli": {"ar_schemes", "ar_kernels", "ar_tuner", "ar_export", "ar_vlm"},
}
NEVER = {"ar_schemes": {"torch", "transformers", "click"}, "ar_kernels": {"click", "datasets"}}
AT_IMPORT = {
    "ar_schemes": {"pluggy"},
    "ar_kernels": {"pluggy", "torch"},
    "ar_tuner": {"pluggy", "torch", "safetensors"},
    "ar_export": {"pluggy", "torch", "safetensors"},
    "ar_vlm": {"pluggy", "torch"},
    "ar_cli": {"pluggy", "click"},
}
LIGHT_EXCEPTIONS = {
    "ar_kernels/hf/quantizer.py": {"transformers"},  # by ar_kernels.hf.arm, after transformers
    # by ar_kernels.hf.quantizer
    **{
        f"ar_kernels/hf/{name}.py": {"transformers"}
        for name in ("attention", "chain", "growing", "renaming")
    },
    # by the backend, when a layer is packed or compiled for it
    **{f"ar_kernels/triton/{name}.py": {"triton"} for name in ("aot", "kernels", "launch")},
}
"""Imported late, and only where what they import is there."""
CATCH_ALL = {
    "ar_schemes/plugins.py",  # a plugin may raise anything
    "ar_kernels/_autoload.py",  # an exception would break `import torch`
    "ar_tuner/calibration/chat.py",  # a template is a program of the model's maker
    "ar_tuner/testing/family.py",  # whatever a model raises is what the check finds
    "ar_tuner/calibration/hub.py",  # a hub's client raises what its network library does
    "ar_tuner/walk.py",  # handed from the frame's thread to the controller, which raises it
}
MAX_FILE, MAX_FUNCTION = 400, 60
MAX_KERNEL = 100
"""Lines of a function in a file of Triton kernels: one program each, which cannot call Python."""

FILES = sorted((ROOT / "packages").glob("*/src/**/*.py"))


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[3]


def short(path: Path) -> str:
    return str(Path(*path.relative_to(ROOT).parts[3:]))


def imports(tree: ast.AST, *, top_level_only: bool = False, types: bool = False) -> set[str]:
    """Return the top-level names imported; those under TYPE_CHECKING only if `types` asks."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        deeper = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if not (top_level_only and deeper):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(tree)
    return found


def private_names(tree: ast.AST, package: str) -> set[str]:
    """Return the private modules and names of siblings that are imported."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ar_"):
            parts = [*(node.module or "").split("."), *(a.name for a in node.names)]
            if parts[0] != package:
                found.update(p for p in parts if p.startswith("_") and not p.startswith("__"))
    return found


@pytest.mark.parametrize("path", FILES, ids=short)
def test_a_module_keeps_the_rules(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = package_of(path)
    used = imports(tree)
    siblings = {n for n in imports(tree, types=True) if n.startswith("ar_")} - {package}
    assert siblings <= MAY_IMPORT[package], f"{short(path)} looks the wrong way: {siblings}"
    assert not used & NEVER.get(package, set())
    assert not private_names(tree, package), f"{short(path)} uses private names of a sibling"
    outside = imports(tree, top_level_only=True) - set(sys.stdlib_module_names)
    outside = {n for n in outside if not n.startswith("ar_")}
    if "testing" not in path.parts:
        allowed = AT_IMPORT[package] | LIGHT_EXCEPTIONS.get(short(path), set())
        assert outside <= allowed, f"{short(path)} imports {outside - allowed} at import"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"{short(path)} has {lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            most = MAX_KERNEL if short(path) == "ar_kernels/triton/kernels.py" else MAX_FUNCTION
            assert length <= most, f"{short(path)}: {node.name} has {length} lines"
        if isinstance(node, ast.ExceptHandler) and short(path) not in CATCH_ALL:
            names = {n.id for n in ast.walk(node.type or node) if isinstance(n, ast.Name)}
            reraised = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
            wide = node.type is None or names & {"Exception", "BaseException"}
            assert not wide or reraised, f"{short(path)} swallows everything"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_declared_dependencies_are_those_of_the_graph(package: str) -> None:
    path = ROOT / "packages" / package.replace("_", "-") / "pyproject.toml"
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    named = {
        d.split("[")[0].split(">")[0].strip().replace("-", "_")
        for d in document["project"]["dependencies"]
    }
    assert {n for n in named if n.startswith("ar_")} <= MAY_IMPORT[package]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ar_schemes", {"torch", "transformers"}),
        ("import ar_kernels", {"transformers", "datasets"}),
        ("import ar_tuner", {"transformers", "datasets"}),
        ("import ar_export", {"transformers", "datasets"}),
        ("import ar_cli.main; ar_cli.main.cli.list_commands(None)", {"torch", "transformers"}),
    ],
    ids=["schemes", "kernels", "tuner", "export", "cli"],
)
def test_importing_stays_light(statement: str, absent: set[str]) -> None:
    code = f"{statement}\nimport sys; print(sorted({absent!r} & set(sys.modules)))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "AR_PLUGINS": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "packages").glob("*/tests/**/*.py")),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_a_packages_tests_need_only_what_it_may_import(path: Path) -> None:
    package = path.relative_to(ROOT).parts[1].replace("-", "_")
    used = imports(ast.parse(path.read_text(encoding="utf-8")), types=True)
    siblings = {n for n in used if n in MAY_IMPORT} - {package}
    assert siblings <= MAY_IMPORT[package]


def test_exceptions_are_of_files_that_exist() -> None:
    names = {short(path) for path in FILES}
    assert CATCH_ALL | LIGHT_EXCEPTIONS.keys() <= names


def test_imports_are_seen_wherever_they_stand() -> None:
    tree = ast.parse(
        "import a.b\n"
        "from c import d\n"
        "if TYPE_CHECKING:\n    import e\n"
        "def f():\n    from g.h import i\n"
        "try:\n    import j\nexcept ImportError:\n    pass\n"
    )
    assert imports(tree) == {"a", "c", "g", "j"}
    assert imports(tree, types=True) == {"a", "c", "e", "g", "j"}
    assert imports(tree, top_level_only=True) == {"a", "c", "j"}


def test_private_names_of_a_sibling_are_seen() -> None:
    tree = ast.parse("from ar_x._y import a\nfrom ar_x import _b\nfrom ar_z import _c, d\n")
    assert private_names(tree, "ar_z") == {"_y", "_b"}
