"""Build the CPU kernels with a sanitizer, ASan and UBSan in turn, and run their driver.

    python packages/ar-kernels/tests/native/sanitize.py [--only NAME] [--keep DIR] [quick]

The driver runs every entry point on every instruction set that the processor has, on buffers of
exactly the size that is needed. It is not instrumented itself: ASan guards what is allocated all
the same, and its sums in double would take most of the time. Objects are made again only where a
source is newer, with --keep. Exits 1 where something differs or a sanitizer stops it, 2 where there
is no compiler.
"""

from __future__ import annotations

import argparse
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(build.SANITIZERS))
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("quick", nargs="?", choices=["quick"])
    given = parser.parse_args()
    command = build.compiler()
    if command is None:
        print("no C++ compiler")
        return 2
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for name in [given.only] if given.only else build.SANITIZERS:
            folder = (given.keep or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            driver = built(build, command, folder, build.SANITIZERS[name])
            print(f"{name}:", flush=True)
            words = ["quick"] if given.quick else []
            failed |= subprocess.run([str(driver), *words], check=False).returncode != 0
    return int(failed)


def built(build: ModuleType, command: str, folder: Path, flags: tuple[str, ...]) -> Path:
    """Return the driver, linked with kernels that have a sanitizer's flags."""
    objects = build.compile_units(command, folder, flags, keep=True)
    made, driver = folder / "driver.o", folder / "driver"
    plain = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-pthread")
    subprocess.run([command, *plain, "-c", str(HERE / "driver.cpp"), "-o", str(made)], check=True)
    subprocess.run(
        [command, *flags, "-pthread", str(made), *map(str, objects), "-o", str(driver)], check=True
    )
    return driver


if __name__ == "__main__":
    sys.exit(main())
