"""Families of kernels, one module each, and the choice between them."""

from ar_kernels.backends.base import Backend, ExactBackend, Need, PackedWeight

__all__ = ["Backend", "ExactBackend", "Need", "PackedWeight"]
