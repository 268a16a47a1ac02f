"""What formats on safetensors files have in common: one layout per layer, skips, entries."""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ar_export.errors import ExportError
from ar_export.formats.base import LayerEntry
from ar_export.formats.scales import as_stored
from ar_kernels import KernelError, layout, layouts
from ar_kernels.layouts.base import optional_of
from ar_kernels.layouts.ragged import evened
from ar_schemes import SchemeError, Span

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor

    from ar_export.formats.base import Request
    from ar_kernels import QuantizedWeight
    from ar_kernels.layouts.base import TensorFact
    from ar_schemes import LayerPlan, Scheme, TensorSpec

_WORD = 32
RAGGED = "_ragged"
"""End of the names of bit orders whose tiles may hang over the edge of a weight."""
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


def require_quantized(request: Request) -> None:
    """Refuse a plan that quantizes nothing.

    Raises:
        ExportError: no layer of the plan is quantized.
    """
    if not request.plan.quantized:
        msg = (
            f"format {request.format}: the plan quantizes no layer, so there is nothing to "
            "pack. Choose another scheme, or write the floats with format fake."
        )
        raise ExportError(msg)


def default_scheme(plan: LayerPlan) -> Scheme:
    """Return the scheme to write as the default: the plan's, else the commonest of its layers."""
    if plan.default.weight is not None and any(
        row.scheme.weight == plan.default.weight for row in plan.quantized
    ):
        return plan.default
    schemes = [row.scheme for row in plan.quantized]
    return max(schemes, key=lambda one: sum(s.weight == one.weight for s in schemes))


def skipped(plan: LayerPlan) -> list[str]:
    """Return the linear layers that stay in 16 bit, by name."""
    return [r.layer.name for r in plan.rows if not r.quantized and r.layer.role != "embedding"]


def kept_parts(plan: LayerPlan) -> list[str]:
    """Return the outermost modules outside the blocks that hold float layers only, by name.

    A vision tower is one. Engines that fuse layers of it ask for names no layer has, which begin
    with the tower's. Names that occur in that of a quantized layer are left out.
    """
    quantized = [f"{row.layer.name}." for row in plan.quantized]
    out: dict[str, None] = {}
    for row in plan.rows:
        if row.quantized or row.layer.block is not None or row.layer.role != "linear":
            continue
        parts = row.layer.name.split(".")
        heads = (".".join(parts[:i]) for i in range(1, len(parts)))
        free = (head for head in heads if not any(f"{head}." in name for name in quantized))
        out |= dict.fromkeys(itertools.islice(free, 1))
    return list(out)


def expert_lists(plan: LayerPlan, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all experts of a list have in common, under the list's name.

    Engines fuse the list and ask for that name; other readers take it for a part of the experts'
    names, every one of which it means.

    Args:
        plan: all layers.
        changes: what a config says of layers, by name; layers it does not speak of are left out.
    """
    lists: dict[str, list[Any]] = {}
    for row in plan.rows:
        hit = _EXPERT.match(row.layer.name)
        if hit:
            lists.setdefault(hit[1], []).append(changes.get(row.layer.name))
    return {
        name: members[0]
        for name, members in lists.items()
        if members[0] is not None and all(m == members[0] for m in members)
    }


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """Turn whatever a foreign config causes into an `ExportError`."""
    try:
        yield
    except (KernelError, SchemeError) as error:
        msg = f"quantization_config: {error}"
        raise ExportError(msg) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # foreign JSON: a list where an object belongs, a word where a number does
        msg = f"quantization_config: a value of the wrong kind: {error}"
        raise ExportError(msg) from error


def entry(name: str, scheme: Scheme, order: str, tensors: Mapping[str, TensorFact]) -> LayerEntry:
    """Return the entry of a layer after checking that its tensors fit its scheme.

    Raises:
        ExportError: they do not.
    """
    for suffix in ("scales", "weight_scale", "weight_scale_inv"):
        scheme = as_stored(scheme, tensors.get(f"{name}.{suffix}"))
    rows, columns = shape_of(name, scheme, order, tensors)
    made = LayerEntry(scheme, rows, columns, order)
    if made.spec != scheme.weight:
        made = replace(made, layout=ragged(order))
    why = layout(made.layout).refuses(made.spec, rows, columns)
    if why is not None:
        msg = f"layer {name}: the config does not fit its tensors: {why}"
        raise ExportError(msg)
    return made


def ragged(order: str) -> str:
    """Return the variant of a bit order for tiles that hang over the edge, itself without one."""
    name = f"{order}{RAGGED}"
    return name if name in layouts() else order


def refusal_of(order: str, spec: TensorSpec, rows: int, columns: int) -> str | None:
    """Return why a weight [rows, columns] cannot be packed, tiles over its edge allowed."""
    even = evened(spec, rows, columns)
    return layout(order if even == spec else ragged(order)).refuses(even, rows, columns)


def packed(order: str, weight: QuantizedWeight, tile: Sequence[int] | None) -> dict[str, Tensor]:
    """Return the tensors of a weight in a bit order, in tiles of the size that a config names.

    The weight's own tiles are smaller where those of the config would hang over its edge.
    """
    where = weight.spec.granularity
    cut = where.span is Span.TILE and tile is not None and where.size != tuple(tile)
    return layout(ragged(order) if cut else order).pack(weight)


def shape_of(
    name: str, scheme: Scheme, order: str, tensors: Mapping[str, TensorFact]
) -> tuple[int, int]:
    """Return rows and columns of a layer, from the shapes of its packed tensors.

    Raises:
        ExportError: a tensor is missing or no matrix, or the width does not fit.
    """
    assert scheme.weight is not None
    bits = scheme.weight.bits
    if order.startswith("gptq"):
        _matrix(f"{name}.scales", tensors)
        words, rows = _matrix(f"{name}.qweight", tensors)
        if words * _WORD % bits:
            raise ExportError(_uneven(name, f"{name}.qweight", words, bits))
        return rows, words * _WORD // bits
    if order == "awq":
        columns, words = _matrix(f"{name}.qweight", tensors)
        return words * _WORD // bits, columns
    if order == "mlx":
        rows, words = _matrix(f"{name}.weight", tensors)
        if words * _WORD % bits:
            raise ExportError(_uneven(name, f"{name}.weight", words, bits))
        return rows, words * _WORD // bits
    if f"{name}.weight" in tensors:
        return _matrix(f"{name}.weight", tensors)
    rows, packed = _matrix(f"{name}.weight_packed", tensors)
    if order != "ct_pack":
        return rows, packed * 2
    groups = _matrix(f"{name}.weight_scale", tensors)[1]
    if scheme.weight.granularity.span == "group":
        return rows, groups * scheme.weight.granularity.size[0]
    if packed * _WORD % bits:
        raise ExportError(_uneven(name, f"{name}.weight_packed", packed, bits))
    return rows, packed * _WORD // bits


def suffixes_of(found: LayerEntry) -> Collection[str]:
    """Return the tensor suffixes that a quantized layer has or may have."""
    order = layout(found.layout)
    needed = order.facts(found.spec, found.rows, found.columns)
    return (*needed, *optional_of(order))


def _matrix(key: str, tensors: Mapping[str, TensorFact]) -> tuple[int, int]:
    fact = tensors.get(key)
    if fact is None or len(fact.shape) != 2:  # noqa: PLR2004
        msg = f"layer {key.rpartition('.')[0]}: {key} is missing or not a matrix"
        raise ExportError(msg)
    return fact.shape[0], fact.shape[1]


def _uneven(name: str, key: str, words: int, bits: int) -> str:
    return (
        f"layer {name}: {words} words of {_WORD} bits in {key} are no whole number "
        f"of {bits}-bit codes; the config names the wrong bits"
    )
