"""Mixed precision: what each layer gets, chosen by how much the model would lose."""

from ar_tuner.auto_scheme.front import Choice, FrontPoint
from ar_tuner.auto_scheme.request import AutoScheme

__all__ = ["AutoScheme", "Choice", "FrontPoint"]
