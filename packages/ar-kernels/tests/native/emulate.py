"""Run the driver of the CPU kernels with AVX512 emulated lane by lane, on a processor without it.

    python packages/ar-kernels/tests/native/emulate.py [--keep DIR] [--library FILE] [quick]

Checks what the kernels for AVX512 compute where they cannot run; the processor needs AVX2.
`--library` makes the shared library instead, for tests in Python (AR_NATIVE_LIBRARY). Exits 1 where
something differs, 2 where there is no compiler.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sanitize import HERE, build_module, built

if TYPE_CHECKING:
    from types import ModuleType

FLAGS = (
    *("-O1", "-mavx2", "-mfma", "-mf16c", "-DAR_EMULATED", "-D__builtin_cpu_supports(name)=1"),
    *(f"-I{HERE / 'emulated'}", "-Wno-psabi", "-ffp-contract=off"),
)


def main() -> int:
    """Build and run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--library", type=Path, metavar="FILE")
    parser.add_argument("quick", nargs="?", choices=["quick"])
    given = parser.parse_args()
    build = without_avx512(build_module())
    command = build.compiler()
    if command is None:
        print("no C++ compiler")
        return 2
    if given.library is not None:
        print(build.build(given.library, FLAGS))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        driver = built(build, command, folder, FLAGS)
        words = ["quick"] if given.quick else []
        return int(subprocess.run([str(driver), *words], check=False).returncode != 0)


def without_avx512(build: ModuleType) -> ModuleType:
    """Return the build module, with units that are compiled for AVX2 at most."""
    build.UNITS = {
        name: tuple(flag for flag in flags if not flag.startswith("-mavx512"))
        for name, flags in build.UNITS.items()
    }
    return build


if __name__ == "__main__":
    sys.exit(main())
