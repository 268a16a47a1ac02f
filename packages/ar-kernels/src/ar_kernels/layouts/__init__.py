"""Bit orders: pack and unpack side by side, one module per family."""

from ar_kernels.layouts.base import Layout, TensorFact

__all__ = ["Layout", "TensorFact"]
