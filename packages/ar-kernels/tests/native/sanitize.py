"""Build the CPU kernels and their driver with ASan and UBSan, and run it.

    python packages/ar-kernels/tests/native/sanitize.py [quick]

Exits with the driver's status; 2 where there is no compiler.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

HERE = Path(__file__).parent


def build_module() -> ModuleType:
    """Return the package's build module, without torch."""
    path = HERE.parents[1] / "src" / "ar_kernels" / "native" / "build.py"
    spec = importlib.util.spec_from_file_location("ar_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Build and run; return the exit status."""
    build = build_module()
    command = build.compiler()
    if command is None:
        print("no C++ compiler")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        objects = build.compile_units(command, Path(folder), build.SANITIZERS)
        driver = Path(folder) / "driver"
        flags = ("-std=c++17", "-Wall", "-Wextra", *build.SANITIZERS)
        sources = (str(HERE / "driver.cpp"), *map(str, objects))
        subprocess.run([command, *flags, *sources, "-o", str(driver)], check=True)
        return subprocess.run([str(driver), *sys.argv[1:]], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
