"""The run directory: one quantization that can be killed at any point and resumed."""

from ar_tuner.run.fingerprint import fingerprint
from ar_tuner.run.journal import Run

__all__ = ["Run", "fingerprint"]
