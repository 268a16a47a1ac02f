"""In which type scales are stored: as the plan says, and as a file shows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ar_export.formats.dtypes import config_dtype
from ar_schemes import LayerPlan

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from typing import Any

    from ar_kernels.layouts.base import TensorFact
    from ar_schemes import Scheme


def with_scales_of(
    plan: LayerPlan, config: Mapping[str, Any], data_types: Collection[str]
) -> LayerPlan:
    """Return the plan with scales of some data types in the float type of the model."""
    name = str(config_dtype(config)).removeprefix("torch.")

    def changed(scheme: Scheme) -> Scheme:
        if scheme.weight is None or scheme.weight.data_type not in data_types:
            return scheme
        return replace(scheme, weight=scheme.weight.with_(scale_dtype=name))

    rows = tuple(replace(row, scheme=changed(row.scheme)) for row in plan.rows)
    return LayerPlan(rows=rows, default=changed(plan.default))


def as_stored(scheme: Scheme, fact: TensorFact | None) -> Scheme:
    """Return the scheme with the float type that its scale has in a file."""
    plain = ("float16", "bfloat16", "float32")
    name = "" if fact is None else str(fact.dtype).removeprefix("torch.")
    if scheme.weight is None or name not in plain or scheme.weight.scale_dtype not in plain:
        return scheme
    return replace(scheme, weight=scheme.weight.with_(scale_dtype=name))
