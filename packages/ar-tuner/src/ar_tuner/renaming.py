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
from ar_tuner.names import strangers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ar_schemes import LayerInfo, PlanRow
    from ar_tuner.source import Source
    from ar_tuner.wiring import Wiring

_JOINED = "its weight is one tensor with others in the checkpoint: stays as it is there"


def layers_in_files(
    layers: Sequence[LayerInfo], wiring: Wiring, source: Source | None
) -> list[LayerInfo]:
    """Return the layers of a model and those that its checkpoint holds beside them.

    Layers whose weight is no tensor of its own in the checkpoint are marked to be kept.

    Args:
        layers: of the model.
        wiring: how it is made of a checkpoint.
        source: the checkpoint, None where there is none.
    """
    joined = _joined(wiring)
    mine = [
        replace(layer, keep=layer.keep or _JOINED) if f"{layer.name}.weight" in joined else layer
        for layer in layers
    ]
    return mine if source is None else [*mine, *strangers(source, wiring.unknown, layers)]


def plan_in_files(plan: LayerPlan, wiring: Wiring) -> LayerPlan:
    """Return a plan whose layers and blocks bear their names in the files.

    A layer that is one tensor with others there stands under that tensor's name, once.
    """
    names, joined = wiring.names, _joined(wiring)
    blocks = {b: _block(b, names) for b in dict.fromkeys(r.layer.block for r in plan.rows) if b}
    rows: dict[str, PlanRow] = {}
    for row in plan.rows:
        key = f"{row.layer.name}.weight"
        for stored in joined.get(key, (names.get(key, key),)):
            name = stored.removesuffix(".weight")
            block = blocks.get(row.layer.block or "")
            rows.setdefault(name, replace(row, layer=replace(row.layer, name=name, block=block)))
    return LayerPlan(rows=tuple(rows.values()), default=plan.default)


def _joined(wiring: Wiring) -> dict[str, tuple[str, ...]]:
    """Return the tensors that a weight of the model is made of, where it is not one alone."""
    return {
        target: piece.sources
        for target, piece in wiring.covered.items()
        if piece.convert is not None and target.endswith(".weight")
    }


def _block(block: str, names: Mapping[str, str]) -> str:
    """Return the name of a block in the files: where most of its tensors lie."""
    index = block.rpartition(".")[2]
    inside = (stored.split(".") for name, stored in names.items() if name.startswith(f"{block}."))
    heads = Counter(".".join(parts[: parts.index(index) + 1]) for parts in inside if index in parts)
    return max(heads, key=lambda head: heads[head], default=block)
