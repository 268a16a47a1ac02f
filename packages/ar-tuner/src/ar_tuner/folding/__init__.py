"""Equivalent scaling: input channels of layers scaled, and the norm before them divided by it."""

from ar_tuner.folding.apply import Folding, apply
from ar_tuner.folding.fold import fold

__all__ = ["Folding", "apply", "fold"]
