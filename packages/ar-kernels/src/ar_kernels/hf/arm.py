"""Register our quantizer with transformers, now or as soon as it is imported.

Standard library only: this may run inside `import torch` (see `ar_kernels._autoload`).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_log = logging.getLogger(__name__)

_HOME = "transformers.quantizers.auto"
# torch, and with it this code, may be imported while _HOME is half way through its own imports;
# modeling_utils is imported after it and before any model can be loaded.
_TARGETS = (_HOME, "transformers.modeling_utils")

STOCK = {
    "auto-round": ("auto_round",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
    "fp8": ("accelerate",),
    "mxfp4": ("accelerate", "kernels", "triton"),
}
"""Quantization method to the packages without which transformers itself cannot load it."""

POLICIES = ("auto", "always", "never")

_QUIET = "_ar_kernels_is_loading"
"""Attribute of _HOME while we import ourselves: that is nobody's explicit import."""


def arm(explicit: bool = True) -> None:
    """Let transformers load the quantized checkpoints that we know.

    Args:
        explicit: True takes every method over; False only those whose packages are missing, so
            that transformers could not load them anyway. Inside `import torch` it is always
            False. The environment variable AR_KERNELS_TAKEOVER decides instead when it says
            `always` or `never`.
    """
    policy = _policy()
    if policy == "never" or hasattr(sys.modules.get(_HOME), _QUIET):
        return
    all_methods = policy == "always" or (explicit and not torch_is_starting())
    if _is_ready(_HOME):
        _register(all_methods)
        return
    for finder in sys.meta_path:
        if getattr(finder, "watches", None) == _HOME:  # ours, from an earlier call
            finder.all_methods = all_methods or finder.all_methods  # type: ignore[attr-defined]
            return
    sys.meta_path.insert(0, _Watch(all_methods))


def torch_is_starting() -> bool:
    """Tell whether torch is in the middle of being imported."""
    return "torch" in sys.modules and not _is_ready("torch")


def _policy() -> str:
    found = os.environ.get("AR_KERNELS_TAKEOVER", "auto").strip().lower() or "auto"
    if found not in POLICIES:
        _log.warning("AR_KERNELS_TAKEOVER=%s is none of %s; using auto", found, ", ".join(POLICIES))
        return "auto"
    return found


def _is_ready(name: str) -> bool:
    """Tell whether a module is imported to its end."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


def _register(all_methods: bool) -> None:
    """Put ourselves into the tables of transformers.

    Only stand-ins: ar_kernels itself is imported when a checkpoint asks for it, so that someone
    else's `import ar_kernels` before that is still seen as explicit.
    """
    home = sys.modules[_HOME]
    for method, packages in STOCK.items():
        if all_methods or not all(_is_installed(name) for name in packages):
            home.AUTO_QUANTIZER_MAPPING[method] = functools.partial(_make_quantizer, method)
            home.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _ConfigStandIn(method)


def _real(method: str) -> ModuleType:
    """Return `ar_kernels.hf.quantizer`, its classes registered in the place of our stand-ins."""
    home = sys.modules[_HOME]
    setattr(home, _QUIET, True)
    try:
        from ar_kernels.hf import quantizer
    finally:
        delattr(home, _QUIET)
    quantizer.register([method])
    return quantizer


def _make_quantizer(method: str, *args: Any, **kwargs: Any) -> Any:
    return _real(method).quantizer(*args, **kwargs)


class _ConfigStandIn:
    """Does what transformers does with a config class: makes a config of a dict."""

    def __init__(self, method: str) -> None:
        self._method = method

    def from_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the config, of the real class."""
        return _real(self._method).CONFIGS[self._method].from_dict(*args, **kwargs)


def _is_installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


class _Watch(MetaPathFinder):
    """Registers once, after a watched module has been imported and _HOME is complete."""

    watches = _HOME

    def __init__(self, all_methods: bool) -> None:
        self.all_methods = all_methods

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders give, its loader made to call back."""
        if fullname not in _TARGETS:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                self._follow(spec)
                return spec
        return None

    def _follow(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        if loader is None:
            return
        execute = loader.exec_module

        def exec_and_tell(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path and (module.__name__ == _HOME or _is_ready(_HOME)):
                sys.meta_path.remove(self)
                _register(self.all_methods)

        loader.exec_module = exec_and_tell  # type: ignore[method-assign]
