"""Compiles the CPU kernels into the wheel, or into the tree of an editable installation.

Without a compiler the wheel holds Python only and every other backend works. AR_NATIVE_BUILD=never
leaves the kernels out, AR_NATIVE_BUILD=require fails without them. AR_NATIVE_PLATFORM names the
platform of the wheel's tag; manylinux_2_17_x86_64 is right for what gcc makes on x86-64 Linux.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):
    """Runs `ar_kernels/native/build.py` and tags the wheel with the platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Build the library before files are collected."""
        wish = os.environ.get("AR_NATIVE_BUILD", "auto")
        if self.target_name != "wheel" or wish == "never":
            return
        build = _build_module(Path(self.root))
        try:
            library = build.build()
        except build.BuildError as error:
            if wish == "require":
                raise
            self.app.display_warning(f"ar-kernels without its CPU kernels: {error}")
            return
        made = [library]
        try:
            made.append(build.build_quick_call())
        except build.BuildError as error:
            if wish == "require":
                raise
            self.app.display_warning(f"ar-kernels calls its CPU kernels through ctypes: {error}")
        system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{os.environ.get('AR_NATIVE_PLATFORM', system)}"
        build_data["artifacts"] += [str(file.relative_to(self.root)) for file in made]


def _build_module(root: Path) -> Any:
    """Return the package's build module without importing the package, which needs torch."""
    path = root / "src" / "ar_kernels" / "native" / "build.py"
    spec = importlib.util.spec_from_file_location("ar_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
