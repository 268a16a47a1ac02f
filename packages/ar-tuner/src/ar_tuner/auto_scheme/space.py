"""What there is to choose: free layers, their options, the units that choose together, prices."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ar_schemes import SchemeError, make_plan, matches
from ar_tuner.errors import TunerError
from ar_tuner.fused import fused_groups

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ar_schemes import LayerInfo, PlanSize, Scheme
    from ar_tuner.auto_scheme.request import AutoScheme
    from ar_tuner.auto_scheme.terrain import Terrain

_EXPERTS = re.compile(r"^(.*\bexperts)\.")
_FLOAT_BYTES = 2


@dataclass(frozen=True)
class Unit:
    """Layers that get one scheme between them, and the names of those they can get."""

    layers: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """The layer's name, or that of the first and the number of others."""
        more = len(self.layers) - 1
        return self.layers[0] + (f" (+{more})" if more else "")


@dataclass(frozen=True)
class Space:
    """Everything a choice needs but the losses.

    Attributes:
        options: the schemes by name.
        units: what chooses.
        layers: the free layers by name.
        bits: stored bits of a free layer under an option, by (layer, option).
        code_bits: the same without scales and zero points.
        fixed_bits: stored bits of layers that count in the average and are not free.
        weights: number of weights that the average is over.
        fixed_bytes: bytes of the files beside the free layers.
    """

    options: Mapping[str, Scheme]
    units: tuple[Unit, ...]
    layers: Mapping[str, LayerInfo]
    bits: Mapping[tuple[str, str], int]
    code_bits: Mapping[tuple[str, str], int]
    fixed_bits: int
    weights: int
    fixed_bytes: int

    def schemes(self, picks: Mapping[str, str]) -> dict[str, Scheme]:
        """Return the schemes by layer for option names by layer."""
        return {layer: self.options[option] for layer, option in picks.items()}


def find_space(asked: AutoScheme, terrain: Terrain) -> Space:
    """Return what there is to choose.

    Raises:
        TunerError: a layer or an option that nothing is left for, or nothing to choose at all.
        SchemeError: an option whose groups do not divide a layer.
    """
    options = asked.schemes
    open_to, reasons = _available(options, terrain)
    held = {
        option: terrain.size(terrain.plan(_uniform(options, open_to, option))) for option in options
    }
    for option, size in held.items():
        for layer, why in size.refused.items():
            if option in open_to.get(layer, ()):
                open_to[layer].remove(option)
                reasons.setdefault(option, why)
    open_to = _nonempty(open_to, options, reasons)
    layers = {layer.name: layer for layer in terrain.layers if layer.name in open_to}
    plan = terrain.plan(_uniform(options, open_to, None))
    size = terrain.size(plan)
    fixed = [
        r
        for r in plan.rows
        if r.layer.name not in layers and (r.layer.block is not None or r.quantized or r.kept)
    ]
    bits, code_bits = _prices(options, layers, open_to, held)
    return Space(
        options=options,
        units=_units(layers, open_to, asked),
        layers=layers,
        bits=bits,
        code_bits=code_bits,
        fixed_bits=sum(8 * size.layers.get(r.layer.name, 0) or round(r.stored_bits) for r in fixed),
        weights=sum(la.weights for la in layers.values()) + sum(r.layer.weights for r in fixed),
        fixed_bytes=size.rest + sum(n for name, n in size.layers.items() if name not in layers),
    )


def _available(
    options: Mapping[str, Scheme], terrain: Terrain
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the options that rules and shapes leave to each layer, and why not, by option."""
    ruled = (*terrain.rules.layer_config, *terrain.rules.ignore_layers)
    mine = {la.name for la in terrain.layers if not any(matches(p, la.name) for p in ruled)}
    embedding = [la.name for la in terrain.layers if la.role == "embedding"]
    ends = {la.name for la in terrain.layers if la.role in ("embedding", "lm_head") and not la.tied}
    open_to: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for name, option in options.items():
        if option.weight is None:
            continue
        rules = dataclasses.replace(terrain.rules, scheme=option)
        try:
            plan = make_plan(terrain.layers, rules)
        except SchemeError as error:
            msg = f"option {name}: {error}"
            raise SchemeError(msg) from error
        # a format that holds embeddings, as GGUF does, has types of its own for both ends
        held = terrain.size(terrain.plan(dict.fromkeys(embedding, option))).layers
        both = ends if any(layer in held for layer in embedding) else set()
        for row in plan.rows:
            layer = row.layer.name
            if layer in mine and (row.quantized or layer in both):
                open_to.setdefault(layer, []).append(name)
            elif layer in mine and row.layer.block is not None:
                reasons.setdefault(name, row.reason)
    for name, option in options.items():
        if option.weight is None:
            for available in open_to.values():
                available.append(name)
    return open_to, reasons


def _uniform(
    options: Mapping[str, Scheme], open_to: Mapping[str, Sequence[str]], wanted: str | None
) -> dict[str, Scheme]:
    """Return one option for all layers that can have it; the others get the first they can."""
    out = {}
    for layer, available in open_to.items():
        first = next((o for o in available if options[o].weight is not None), available[0])
        out[layer] = options[wanted if wanted in available else first]  # type: ignore[index]
    return out


def _nonempty(
    open_to: Mapping[str, list[str]], options: Mapping[str, Scheme], reasons: Mapping[str, str]
) -> dict[str, list[str]]:
    """Return the layers with a choice of options that quantize, after checking all options."""
    floats = {name for name, option in options.items() if option.weight is None}
    left = {layer: found for layer, found in open_to.items() if set(found) - floats}
    used = {option for found in left.values() for option in found}
    for option in options:
        if option not in used:
            why = reasons.get(option, "no layer of this model is free to have it")
            msg = f"option {option} can be given to no layer: {why}"
            raise TunerError(msg)
    return left


def _prices(
    options: Mapping[str, Scheme],
    layers: Mapping[str, LayerInfo],
    open_to: Mapping[str, Sequence[str]],
    held: Mapping[str, PlanSize],
) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
    bits: dict[tuple[str, str], int] = {}
    code_bits: dict[tuple[str, str], int] = {}
    for layer, info in layers.items():
        for option in open_to[layer]:
            spec = options[option].weight
            stored = held[option].layers.get(layer, info.weights * _FLOAT_BYTES)
            bits[layer, option] = 8 * stored
            code_bits[layer, option] = info.weights * (16 if spec is None else spec.bits)
    return bits, code_bits


def _units(
    layers: Mapping[str, LayerInfo], open_to: Mapping[str, Sequence[str]], asked: AutoScheme
) -> tuple[Unit, ...]:
    """Return the layers in units that choose together, in the model's order."""
    groups: list[Iterable[str]] = list(_experts(layers))
    if asked.shared_layers is None:
        groups += fused_groups(list(layers))
    else:
        groups += [g for shared in asked.shared_layers for g in _shared(layers, shared)]
    unit_of = {layer: [layer] for layer in layers}
    for group in groups:
        merged: list[str] = []
        for layer in group:
            if unit_of[layer] is not merged:
                merged += unit_of[layer]
                for member in unit_of[layer]:
                    unit_of[member] = merged
    order = {layer: i for i, layer in enumerate(layers)}
    out: dict[str, Unit] = {}
    for layer in layers:
        members = tuple(sorted(unit_of[layer], key=order.__getitem__))
        common = [o for o in open_to[layer] if all(o in open_to[m] for m in members)]
        if not common:
            msg = (
                f"layers {', '.join(members)} must share a scheme, but no option fits them all: "
                + "; ".join(f"{m}: {', '.join(open_to[m])}" for m in members[:4])
            )
            raise TunerError(msg)
        out[members[0]] = Unit(members, tuple(common))
    return tuple(out.values())


def _experts(layers: Mapping[str, LayerInfo]) -> list[list[str]]:
    """Return the experts of each layer together: kernels run them as one tensor."""
    groups: dict[str, list[str]] = {}
    for name in layers:
        found = _EXPERTS.match(name)
        if found is not None:
            groups.setdefault(found[1], []).append(name)
    return list(groups.values())


def _shared(layers: Mapping[str, LayerInfo], patterns: Sequence[str]) -> list[list[str]]:
    """Return what a user's list of patterns matches, block by block.

    Raises:
        TunerError: a pattern that matches no free layer.
    """
    groups: dict[str | None, list[str]] = {}
    for pattern in patterns:
        try:
            hits = [name for name in layers if matches(pattern, name)]
        except re.error as error:
            msg = f"shared_layers {pattern!r} is no regular expression: {error}"
            raise TunerError(msg) from error
        if not hits:
            ends = sorted({name.rsplit(".", 1)[-1] for name in layers})
            msg = (
                f"shared_layers {pattern!r} matches no layer that is free to choose. "
                f"Layer names end in: {', '.join(ends[:20])}."
            )
            raise TunerError(msg)
        for name in hits:
            group = groups.setdefault(layers[name].block, [])
            if name not in group:
                group.append(name)
    return list(groups.values())
