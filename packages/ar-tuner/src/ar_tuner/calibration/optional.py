"""Libraries that only some calibration data needs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from ar_tuner.errors import TunerError


def check_installed(name: str, purpose: str) -> None:
    """Refuse early what `load` would refuse, without importing the library.

    Raises:
        TunerError: it is not installed.
    """
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        raise TunerError(_missing(name, purpose))


def load(name: str, purpose: str) -> Any:
    """Return a module.

    Raises:
        TunerError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TunerError(_missing(name.partition(".")[0], purpose)) from error


def _missing(name: str, purpose: str) -> str:
    return f"{purpose} needs the package {name}, which is not installed: pip install {name}"
