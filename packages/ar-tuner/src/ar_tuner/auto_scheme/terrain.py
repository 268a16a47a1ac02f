"""What a choice is made on: layers, rules, the plans of choices and what they take on disk."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_schemes import LayerPlan, PlanSize, scheme, settled
from ar_tuner.names import map_names, source_files, tensor_facts
from ar_tuner.registry import measure_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from ar_schemes import LayerInfo, LayerRules, Scheme

    Facts = Mapping[str, tuple[tuple[int, ...], str]]


def float_facts(model: nn.Module, source: Path | None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and type of the tensors of the float checkpoint, by name in the model.

    Tensors that the model does not have keep the name they have in the checkpoint.
    """
    if source is None:
        return {
            key: (tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for key, t in model.state_dict().items()
        }
    files = source_files(source)
    names = {stored: key for key, stored in map_names(model.state_dict(), files).items()}
    return {names.get(key, key): fact for key, fact in tensor_facts(files).items()}


BASE = "W4A16"
"""Completes what a user's rule leaves open (`{"bits": 8}`), as no one option is the default."""


@dataclass(frozen=True)
class Sizer:
    """Tells the bytes of plans in formats: of each layer and of the rest, the largest of them.

    Without a format, or one that tells, it is what the schemes say.

    Attributes:
        formats: as the user spells them.
        config: the model's, plain values.
        facts: shape and type of the float tensors.
    """

    formats: Sequence[str]
    config: Mapping[str, Any]
    facts: Facts

    def __call__(self, plan: LayerPlan) -> PlanSize:
        """Return the bytes of a plan."""
        floats = _untouched(plan, self.facts)
        sizes = [measure_plan(name, plan, self.config, floats) for name in self.formats]
        found = [size for size in sizes if size is not None]
        if not found:
            return _by_schemes(plan, floats)
        refused = {layer: why for size in found for layer, why in size.refused.items()}
        layers = {
            layer: max(size.layers.get(layer, 0) for size in found)
            for layer in found[0].layers
            if layer not in refused
        }
        return PlanSize(layers, max(size.rest for size in found), refused)


@dataclass(frozen=True)
class Terrain:
    """What a choice is made on.

    Attributes:
        layers: every layer of the model.
        rules: what the user wants beside the options; its scheme is replaced by each of them.
        plan: the plan of a choice: schemes by layer, for the free layers.
        size: what a plan takes in the formats asked for.
    """

    layers: tuple[LayerInfo, ...]
    rules: LayerRules
    plan: Callable[[Mapping[str, Scheme]], LayerPlan]
    size: Callable[[LayerPlan], PlanSize]


def terrain(
    layers: Sequence[LayerInfo],
    rules: LayerRules,
    *,
    resolve: Callable[[LayerRules], LayerPlan],
    size: Callable[[LayerPlan], PlanSize],
) -> Terrain:
    """Return the terrain of a model; `resolve` makes a plan of rules, as formats want it."""
    rules = settled(rules, scheme(BASE))
    weights = {layer.name: layer.weights for layer in layers}

    def plan(chosen: Mapping[str, Scheme]) -> LayerPlan:
        made = dataclasses.replace(
            rules,
            scheme=_commonest(chosen, weights) or rules.scheme,
            # names are exact, so they win over patterns and no format's mix touches them
            layer_config={**rules.layer_config, **chosen},
        )
        return _told(resolve(made), chosen)

    return Terrain(tuple(layers), rules, plan, size)


def _commonest(chosen: Mapping[str, Scheme], weights: Mapping[str, int]) -> Scheme | None:
    """Return the scheme that most weights have, of those that quantize."""
    count: Counter[Scheme] = Counter()
    for layer, which in chosen.items():
        if which.weight is not None:
            count[which] += weights[layer]
    return count.most_common(1)[0][0] if count else None


def _told(plan: LayerPlan, chosen: Mapping[str, Scheme]) -> LayerPlan:
    """Return the plan with the choice named as the reason."""
    rows = tuple(
        dataclasses.replace(row, reason="auto_scheme")
        if row.layer.name in chosen and row.reason.startswith("layer_config")
        else row
        for row in plan.rows
    )
    return LayerPlan(rows, plan.default)


def _untouched(plan: LayerPlan, facts: Facts) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the tensors that a plan leaves as they are; a tied head has none of its own."""
    replaced = {f"{r.layer.name}.weight" for r in plan.rows if r.quantized or r.layer.tied}
    return {key: fact for key, fact in facts.items() if key not in replaced}


def _by_schemes(plan: LayerPlan, floats: Facts) -> PlanSize:
    layers = {r.layer.name: math.ceil(r.stored_bits / 8) for r in plan.quantized}
    rest = sum(
        math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in floats.values()
    )
    refused = {
        r.layer.name: "without a format, embeddings stay as they are"
        for r in plan.quantized
        if r.layer.role == "embedding"
    }
    return PlanSize({k: v for k, v in layers.items() if k not in refused}, rest, refused)
