"""Weights that conformance tests and others' tests quantize."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ar_kernels.registry import data_type

if TYPE_CHECKING:
    from torch import Tensor

    from ar_kernels.weight import QuantizedWeight
    from ar_schemes import TensorSpec


def float_weights(rows: int, columns: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Return float32 weights [rows, columns] by a name that says what is special about them."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator) * 0.05
    outlier = normal.clone()
    outlier[:, 0] = 40 * outlier[:, 0].sign()
    mixed = normal.clone()
    mixed[0] = 0
    return {
        "normal": normal,
        "positive": normal.abs() + 0.01,
        "negative": -normal.abs() - 0.01,
        "outlier": outlier,
        "zero row": mixed,
        "zeros": torch.zeros(rows, columns),
        "constant": torch.full((rows, columns), 0.3),
        "tiny": normal * 1e-6,
        "bfloat16": normal.to(torch.bfloat16),
    }


def quantized(spec: TensorSpec, rows: int, columns: int, *, seed: int = 0) -> QuantizedWeight:
    """Return a random weight quantized with the data type that the spec names."""
    arithmetic = data_type(spec.data_type)
    weight = float_weights(rows, columns, seed=seed)["normal"]
    return arithmetic.quantize(weight, spec, arithmetic.parameters(weight, spec))
