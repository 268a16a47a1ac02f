"""What a plan takes in the files of a format, before there is a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ar_export.formats.base import Container, HoldsEmbeddings, SizesFloats
from ar_export.formats.dtypes import config_dtype
from ar_kernels import data_type
from ar_schemes import LayerPlan, PlanSize, Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ar_export.formats.base import Format
    from ar_kernels import QuantizedWeight
    from ar_schemes import PlanRow

_PERIOD = 128
"""Rows after which the bytes of every bit order repeat."""
_ENTRY = 52
"""Bytes of a tensor's entry in a safetensors header beside its name, type and numbers."""

_OFFSET = 11
"""Digits of an offset in a file of less than 100 GB."""
_HEADER = 64


@dataclass(frozen=True)
class _Asked:
    """A request for a config alone."""

    format: str
    config: Mapping[str, Any]
    plan: LayerPlan
    output: Path = Path()
    source: Path | None = None
    blocks: tuple[str, ...] = ()
    facts: Mapping[str, Any] = ()  # type: ignore[assignment]


def plan_size(
    found: Format,
    spelling: str,
    plan: LayerPlan,
    config: Mapping[str, Any],
    floats: Mapping[str, tuple[tuple[int, ...], str]],
) -> PlanSize | None:
    """Return the bytes of a plan in a format; see the hook `ar_measure_plan`.

    A layer is packed once per scheme and shape from a sample of few rows, so that the bytes are
    those of the format's own code, a plugin's included. Headers are counted a little too long.
    None: the format writes floats, whatever the plan says.

    Raises:
        ExportError: the plan as a whole cannot be written in this format.
    """
    refused = {}
    for row in plan.quantized:
        why = refusal(found, spelling, row)
        if why is not None:
            refused[row.layer.name] = why
    rows = [r for r in plan.quantized if r.layer.name not in refused]
    kept = tuple(
        replace(r, scheme=Scheme(name="BF16")) if r.layer.name in refused else r for r in plan.rows
    )
    layers: dict[str, int] = {}
    headers = 0
    if rows:
        asked = _Asked(spelling, config, LayerPlan(kept, plan.default), facts={})
        written = found.config(asked)
        if written is None and not isinstance(found, Container):
            return None
        known: dict[object, tuple[int, tuple[str, ...]]] = {}
        for row in rows:
            key = (row.scheme.weight, row.scheme.activation, row.layer.rows, row.layer.columns)
            if key not in known:
                known[key] = _layer_size(found, written, row, config_dtype(config))
            size, suffixes = known[key]
            layers[row.layer.name] = size * row.layer.copies
            shape = (row.layer.rows, row.layer.columns)
            headers += sum(_entry(f"{row.layer.name}.{suffix}", shape) for suffix in suffixes)
    if isinstance(found, SizesFloats):
        return PlanSize(layers, found.float_bytes(config, floats), refused)
    rest = sum(math.prod(shape) * _width(name) for shape, name in floats.values())
    headers += sum(_entry(name, shape) for name, (shape, _) in floats.items())
    return PlanSize(layers, rest + headers + _HEADER, refused)


def _entry(name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor's entry in a header: name, type, shape, begin and end."""
    return len(name) + _ENTRY + sum(len(str(n)) + 1 for n in shape) + 2 * _OFFSET


def refusal(found: Format, spelling: str, row: PlanRow) -> str | None:
    """Return why a format cannot carry a layer as planned, or None."""
    why = found.refuses(spelling, row.scheme, row.layer.rows, row.layer.columns)
    if why is None and row.layer.role == "embedding" and not isinstance(found, HoldsEmbeddings):
        why = f"{found.name} cannot hold a quantized embedding"
    return why


def _layer_size(
    found: Format, written: Mapping[str, Any] | None, row: PlanRow, dtype: torch.dtype
) -> tuple[int, tuple[str, ...]]:
    """Return bytes and names of the tensors of one layer (or expert, where there are several)."""
    rows, columns = row.layer.rows, row.layer.columns
    tile = 1
    if row.scheme.weight is not None and row.scheme.weight.granularity.span == "tile":
        tile = row.scheme.weight.granularity.size[0]
    period = math.lcm(_PERIOD, tile)
    few = rows % period + period
    if few + period >= rows:
        return _packed_size(found, written, row.scheme, (rows, columns), dtype)
    small, suffixes = _packed_size(found, written, row.scheme, (few, columns), dtype)
    larger, _ = _packed_size(found, written, row.scheme, (few + period, columns), dtype)
    return small + (larger - small) * ((rows - few) // period), suffixes


def _packed_size(
    found: Format,
    written: Mapping[str, Any] | None,
    scheme: Scheme,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[int, tuple[str, ...]]:
    parts = found.tensors(written, _sample(scheme, shape), dtype)
    return sum(t.numel() * t.element_size() for t in parts.values()), tuple(parts)


def _sample(scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight:
    """Return some quantized weight of a scheme, with the ranges of static activations."""
    spec, act = scheme.weight, scheme.activation
    assert spec is not None
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kind = data_type(spec.data_type)
    out = kind.quantize(weight, spec, kind.parameters(weight, spec))
    if act is None or (act.dynamic and act.data_type != "nv_fp4_with_static_gs"):
        return out
    name = "input_global_scale" if act.data_type == "nv_fp4_with_static_gs" else "input_scale"
    return replace(out, extra={**out.extra, name: torch.ones(1)})


def _width(name: str) -> int:
    found: torch.dtype = getattr(torch, name)
    return found.itemsize
