"""Build the shared library of our CPU kernels: `python -m ar_kernels.native.build`.

Needs a C++17 compiler (`CXX`, g++, clang++ or c++) and nothing else: the library uses the C
library alone, so it serves every version of Python and torch. Where Python's headers are there too,
a small module beside it calls the library without ctypes, from any CPython of version 3.10 or
later. The package's own build runs the same functions, which is why this module imports the
standard library only.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
SOURCES = HERE / "src"
LIBRARY = HERE / "libar_native.so"
QUICK_CALL = HERE / "_quick_call.abi3.so"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_EXACT = ("-ffp-contract=off",)
"""What tuning computes is compared to the bit with torch's separate operations."""
UNITS: dict[str, tuple[str, ...]] = {
    "kernel_avx512_bf16": (*_AVX512, "-mavx512bf16", "-mavx512vbmi"),
    "kernel_digits": (*_AVX512, "-mavx512vnni"),
    "kernel_avx512": _AVX512,
    "kernel_avx2": _AVX2,
    "kernel_portable": (),
    "tuning_avx512": (*_AVX512, *_EXACT),
    "tuning_avx2": (*_AVX2, *_EXACT),
    "tuning_portable": _EXACT,
    "pack": (),
    "api": (),
    "api_steps": (),
    "api_compact": (),
    "api_run": (),
    "api_tuning": (),
}
"""Sources, longest to compile first, and the instructions each may use."""
_X86_ONLY = (
    *("kernel_avx512_bf16", "kernel_digits", "kernel_avx512", "kernel_avx2"),
    *("tuning_avx512", "tuning_avx2"),
)
FLAGS = (
    *("-std=c++17", "-O3", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"),
    *("-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-fno-math-errno"),
    # gcc 12 takes its own intrinsics' undefined values for ours
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
SANITIZERS = {
    name: ("-O1", "-g1", f"-fsanitize={name}", "-fno-sanitize-recover=all")
    for name in ("address", "undefined")
}
"""Flags of each: g++ takes minutes for kernel_avx512_bf16 with one, and did not end with both."""


class BuildError(Exception):
    """The library cannot be built; the message says why."""


def compiler() -> str | None:
    """Return the C++ compiler to use, or None where there is none."""
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else ("g++", "clang++", "c++")
    return next((found for name in names if (found := shutil.which(name))), None)


def _command() -> str:
    found = compiler()
    if found is None:
        msg = "no C++ compiler: set CXX, or install g++ or clang++"
        raise BuildError(msg)
    return found


def units() -> dict[str, tuple[str, ...]]:
    """Return the sources for this processor's family, with their flags."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return UNITS
    return {
        name: (*flags, "-DAR_PORTABLE_ONLY")
        for name, flags in UNITS.items()
        if name not in _X86_ONLY
    }


def build(output: Path = LIBRARY, extra: Sequence[str] = ()) -> Path:
    """Compile and link the library, and return where it is.

    Args:
        output: file to make; replaced in one step.
        extra: further flags, for compiling and linking.

    Raises:
        BuildError: there is no compiler, or it fails; with what it said.
    """
    command = _command()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        objects = compile_units(command, Path(folder), extra)
        made = Path(folder) / output.name
        # the standard library of C++ is not used, so the linker leaves it out
        link = () if sys.platform == "darwin" else ("-Wl,--as-needed", "-Wl,--no-undefined")
        _run([command, "-shared", *extra, "-o", str(made), *map(str, objects), *link])
        made.replace(output)
    return output


def build_quick_call(output: Path = QUICK_CALL) -> Path:
    """Compile the module that calls the library without ctypes, and return where it is.

    Args:
        output: file to make; replaced in one step.

    Raises:
        BuildError: there is no compiler, or it fails; or Python's headers are missing.
    """
    command, headers = _command(), Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        msg = f"no {headers / 'Python.h'}: install the headers of Python"
        raise BuildError(msg)
    # what the module calls of Python is found in the process that loads it
    link = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-Wl,--as-needed",)
    source = SOURCES / "quick_call.cpp"
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        flags = (*FLAGS, f"-I{headers}", "-shared")
        _run([command, *flags, str(source), "-o", str(made), *link])
        made.replace(output)
    return output


def compile_units(
    command: str, folder: Path, extra: Sequence[str] = (), *, keep: bool = False
) -> list[Path]:
    """Compile every source into a folder, two at a time, and return the objects.

    Args:
        command: the compiler.
        folder: where the objects go.
        extra: further flags.
        keep: leave objects alone that are newer than all sources.

    Raises:
        BuildError: the compiler fails.
    """

    def one(item: tuple[str, tuple[str, ...]]) -> Path:
        name, flags = item
        made = folder / f"{name}.o"
        if keep and made.is_file() and made.stat().st_mtime > newest:
            return made
        _run([command, *FLAGS, *extra, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(made)])
        return made

    newest = max(source.stat().st_mtime for source in SOURCES.iterdir())
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(one, units().items()))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        msg = f"{' '.join(command)} failed:\n{done.stderr}"
        raise BuildError(msg)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build as the command line asks; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ar_kernels.native.build", description=__doc__)
    parser.add_argument("--output", type=Path, default=LIBRARY, help="file to make")
    parser.add_argument("--sanitize", choices=list(SANITIZERS), help="check while running")
    options = parser.parse_args(arguments)
    try:
        made = build(options.output, SANITIZERS.get(options.sanitize, ()))
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{made}\n")
    if made == LIBRARY:
        try:
            sys.stdout.write(f"{build_quick_call()}\n")
        except BuildError as error:
            sys.stderr.write(f"calls go through ctypes, which takes longer: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
