"""Conformance tests for plugin authors: subclass in a test module, name the subject, run pytest.

    class TestMyLayout(LayoutConformance):
        subject = MyLayout()
        specs = (TensorSpec(bits=4),)

Needs pytest; the rest of the package does not.
"""

from ar_kernels.testing.backends import BackendConformance
from ar_kernels.testing.data_types import DataTypeConformance
from ar_kernels.testing.layouts import LayoutConformance
from ar_kernels.testing.samples import float_weights, quantized

__all__ = [
    "BackendConformance",
    "DataTypeConformance",
    "LayoutConformance",
    "float_weights",
    "quantized",
]
