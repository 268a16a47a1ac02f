"""Families of kernels, one module each, and the choice between them."""

from ar_kernels.backends.base import Backend, ExactBackend, Need, PackedWeight
from ar_kernels.backends.support import Declares, Installable, Support

__all__ = [
    "Backend",
    "Declares",
    "ExactBackend",
    "Installable",
    "Need",
    "PackedWeight",
    "Support",
]
