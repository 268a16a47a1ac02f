"""From a float model to quantized weights: blocks, calibration, SignRound, RTN, resumable runs."""

from ar_tuner.api import AutoRound
from ar_tuner.auto_scheme import AutoScheme
from ar_tuner.errors import TunerError
from ar_tuner.hookspecs import hookimpl
from ar_tuner.settings import Settings

__version__ = "0.1.0"

__all__ = ["AutoRound", "AutoScheme", "Settings", "TunerError", "hookimpl"]
