"""What a machine has, found out without importing anything heavy."""

from __future__ import annotations

import functools
from importlib import metadata
from importlib.util import find_spec

import torch


def lacks(module: str, *, package: str | None = None) -> str | None:
    """Return what is missing when a module cannot be found, or None.

    Args:
        module: name to import; of its parents only those are imported that hold it.
        package: what to install, where the name differs.
    """
    try:
        found = find_spec(module)
    except (ImportError, ValueError):  # a parent is missing or half imported
        found = None
    return None if found is not None else f"the package {package or module}"


@functools.cache
def version(package: str) -> tuple[int, ...] | None:
    """Return the leading numbers of an installed distribution's version, None if there is none."""
    try:
        text = metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
    numbers: list[int] = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def has_op(name: str) -> bool:
    """Tell whether an operator `library::name` is registered."""
    library, _, op = name.partition("::")
    return hasattr(getattr(torch.ops, library), op)


def capability(device: str) -> tuple[int, int] | None:
    """Return the compute capability of the NVIDIA GPU in use; None where there is none."""
    if device != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability()


def lacks_device(device: str) -> str | None:
    """Return what is missing when the machine has no device of a torch type, or None."""
    if device == "cpu":
        return None
    module = getattr(torch, device, None)
    return None if module is not None and module.is_available() else f"a device of type {device}"


def wrong_device(own: str, asked: str) -> str | None:
    """Return why a backend of one device cannot serve another, or None."""
    return None if own == asked else f"runs on {own}, the layer is on {asked}"
