"""Layers that engines fuse into one, and what they must then have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ar_kernels import data_type

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ar_tuner.algorithms.base import BlockTask

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Siblings that vLLM and SGLang join into one matrix."""


def fused_groups(layers: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the layers in groups that engines fuse; most groups have one member."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        parent, _, tail = layer.rpartition(".")
        first = next((members[0] for members in FUSED if tail in members), tail)
        groups.setdefault((parent, first), []).append(layer)
    return [tuple(group) for group in groups.values()]


def shared_values(task: BlockTask) -> dict[str, Mapping[str, Tensor]]:
    """Return, by layer, the parameters that the members of its fused group have in common."""
    targets = {t.ref.layer: t for t in task.targets}
    out: dict[str, Mapping[str, Tensor]] = {}
    for group in fused_groups(list(targets)):
        spec = targets[group[0]].scheme.weight
        assert spec is not None
        alike = [layer for layer in group if targets[layer].scheme.weight == spec]
        weights = [task.weight(targets[layer]) for layer in alike]
        values = data_type(spec.data_type).shared(weights, spec)
        if values:
            out |= dict.fromkeys(alike, values)
    return out
