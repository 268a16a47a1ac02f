"""Conformance tests for authors of checkpoint formats: subclass, name the subject, run pytest.

    class TestMyFormat(FormatConformance):
        subject = MyFormat()

Needs pytest; the rest of the package does not.
"""

from ar_export.testing.formats import FormatConformance
from ar_export.testing.model import (
    CONFIG,
    LAYERS,
    ExampleRequest,
    example_plan,
    example_weights,
    float_tensors,
    write_model,
)

__all__ = [
    "CONFIG",
    "LAYERS",
    "ExampleRequest",
    "FormatConformance",
    "example_plan",
    "example_weights",
    "float_tensors",
    "write_model",
]
