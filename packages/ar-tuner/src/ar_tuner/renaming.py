"""Layers under the names that the files give them, where those differ from the model's.

Transformers renames modules when it loads (`backbone.layers` becomes `model.layers`, experts move
from `block_sparse_moe` to `mlp`). Inside the tuner, layers go by the model's names; in what is
written they go by the checkpoint's, which are those that engines know.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from ar_schemes import LayerPlan
from ar_tuner.names import kept_in_parts, strangers
from ar_tuner.source import stored_schemes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from ar_schemes import LayerInfo, PlanRow, Scheme
    from ar_tuner.source import Source
    from ar_tuner.wiring import Wiring


def layers_in_files(
    layers: Sequence[LayerInfo], wiring: Wiring, source: Source | None, model: nn.Module
) -> list[LayerInfo]:
    """Return the layers of a model and those that its checkpoint holds beside them.

    Layers whose weight is several tensors in the checkpoint are marked to be kept.

    Args:
        layers: of the model.
        wiring: how it is made of a checkpoint.
        source: the checkpoint, None where there is none.
        model: the model.
    """
    mine = kept_in_parts(layers, wiring.covered, model)
    if source is None:
        return mine
    schemes, names = stored_schemes(source), _stored_names(wiring)
    found = [*mine, *strangers(source, wiring.unknown, layers)]
    return [replace(la, stored=_stored(names(f"{la.name}.weight"), schemes)) for la in found]


def plan_in_files(plan: LayerPlan, wiring: Wiring, source: Source | None = None) -> LayerPlan:
    """Return a plan whose layers and blocks bear their names in the files.

    A layer that is several tensors there stands under the name of each; where it is kept as it is
    stored, with the shape and the scheme of each.
    """
    names, stored_names = wiring.names, _stored_names(wiring)
    schemes = stored_schemes(source)
    blocks = {b: _block(b, names) for b in dict.fromkeys(r.layer.block for r in plan.rows) if b}
    rows: dict[str, PlanRow] = {}
    for row in plan.rows:
        block = blocks.get(row.layer.block or "")
        parts = stored_names(f"{row.layer.name}.weight")
        for stored in parts:
            name = stored.removesuffix(".weight")
            layer = replace(row.layer, name=name, block=block)
            made = replace(row, layer=layer)
            if row.kept and source is not None:
                own = schemes.get(stored)
                shape = source.shape(stored) if len(parts) > 1 else (layer.rows, layer.columns)
                layer = replace(layer, rows=shape[0], columns=shape[1], stored=own)
                made = replace(made, layer=layer, kept=own is not None)
            rows.setdefault(name, made)
    return LayerPlan(rows=tuple(rows.values()), default=plan.default)


def _stored(names: Sequence[str], schemes: Mapping[str, Scheme]) -> Scheme | None:
    """Return the first scheme that the tensors of a layer are stored in, None: floats."""
    return next((schemes[name] for name in names if name in schemes), None)


def _stored_names(wiring: Wiring) -> Callable[[str], tuple[str, ...]]:
    """Return a function from a weight of the model to the tensors of the files it is made of."""
    names, joined = wiring.names, _joined(wiring)
    return lambda key: joined.get(key, (names.get(key, key),))


def _joined(wiring: Wiring) -> dict[str, tuple[str, ...]]:
    """Return the tensors that a weight of the model is joined of, where there are several."""
    return {
        target: piece.sources
        for target, piece in wiring.covered.items()
        if piece.convert is not None and len(piece.sources) > 1 and target.endswith(".weight")
    }


def _block(block: str, names: Mapping[str, str]) -> str:
    """Return the name of a block in the files: where most of its tensors lie."""
    index = block.rpartition(".")[2]
    inside = (stored.split(".") for name, stored in names.items() if name.startswith(f"{block}."))
    heads = Counter(".".join(parts[: parts.index(index) + 1]) for parts in inside if index in parts)
    return max(heads, key=lambda head: heads[head], default=block)
