"""How each linear layer of a model is stored: the config says how, the files say whether."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ar_kernels import registry
from ar_kernels.hf.config import LayerFormat
from ar_kernels.layer_tensors import RANGES
from ar_kernels.layouts.base import optional_of
from ar_kernels.layouts.ragged import even_tiles, is_ragged
from ar_kernels.numerics.activation import refuses_activation
from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ar_kernels.hf.stored import StoredLayer
    from ar_kernels.hf.understand import Understood
    from ar_kernels.layouts.base import TensorFact

_SCALES = ("scales", "weight_scale", "weight_scale_inv")
_ZERO = "input_zero_point"
_FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Opening:
    """How one layer is opened.

    Attributes:
        format: its scheme and the bit order.
        stored: shape and type of its tensors in the files, by suffix; empty when unknown.
    """

    format: LayerFormat
    stored: Mapping[str, TensorFact] = field(default_factory=dict)


def layer_openings(
    config: Understood,
    layers: Mapping[str, tuple[int, int]],
    *,
    stored: Mapping[str, StoredLayer] | None,
    heads: Iterable[str],
    prefix: str,
) -> dict[str, Opening]:
    """Return how each quantized layer is stored.

    Args:
        config: the checkpoint's config.
        layers: (rows, columns) of every linear layer of the model.
        stored: what the files hold, None when unknown.
        heads: names of the output heads.
        prefix: name of the model's body in the model with a head (`model`).

    Raises:
        KernelError: config and files contradict each other, or a layer cannot be opened; all
            such layers are listed.
    """
    known = stored or {}
    names = {
        layer: (layer, known[layer].name if layer in known else layer)
        + (f"{prefix}.{layer}", layer.removeprefix(f"{prefix}."))
        for layer in layers
    }
    said = config.resolve(names, frozenset(heads))
    out: dict[str, Opening] = {}
    bad: dict[str, str] = {}
    for layer, shape in layers.items():
        found, held = said.get(layer), known.get(layer)
        if stored is not None:
            # a float weight in the files is a float layer whatever the config says: writers
            # leave odd shapes and tied heads alone without naming them
            if held is None or not held.packed:
                continue
            why, found = config.settle(found, held)
            if why is not None:
                bad[layer] = why
                continue
        if found is None or found.scheme.weight is None:
            continue
        found = _ragged(found, shape)
        if held is not None:
            found = _scales_as_stored(found, shape, held)
        why = _hurdle(found, shape, held)
        if why is not None:
            bad[layer] = why
        out[layer] = Opening(found, {} if held is None else held.facts)
    if bad:
        lines = "\n".join(f"  {layer}: {why}" for layer, why in bad.items())
        msg = f"{len(bad)} layers of this {config.method} checkpoint cannot be opened:\n{lines}"
        raise KernelError(msg)
    return out


def _ragged(found: LayerFormat, shape: tuple[int, int]) -> LayerFormat:
    """Return the format for tiles that do not divide a weight, where it has such."""
    weight = found.scheme.weight
    assert weight is not None
    name = f"{found.layout}_ragged"
    if name not in registry.layouts() or not is_ragged(weight, *shape):
        return found
    changed = weight.with_(granularity=even_tiles(*shape))
    return LayerFormat(replace(found.scheme, weight=changed), name)


def _scales_as_stored(
    found: LayerFormat, shape: tuple[int, int], layer: StoredLayer
) -> LayerFormat:
    """Return the format with the float type that the scale has in the files.

    Where the layout has one type only, it stays: the layer casts what is exact in that type.
    """
    weight = found.scheme.weight
    assert weight is not None
    for suffix in _SCALES:
        kind = str(layer.facts[suffix].dtype)[6:] if suffix in layer.facts else ""
        if kind in _FLOATS and weight.scale_dtype in _FLOATS:
            seen = weight.with_(scale_dtype=kind)
            if registry.layout(found.layout).refuses(seen, *shape) is None:
                return replace(found, scheme=replace(found.scheme, weight=seen))
    return found


def _hurdle(found: LayerFormat, shape: tuple[int, int], layer: StoredLayer | None) -> str | None:
    """Return why a layer cannot be opened, or None."""
    weight, act = found.scheme.weight, found.scheme.activation
    assert weight is not None
    layout = registry.layout(found.layout)
    why = layout.refuses(weight, *shape)
    if why is None and act is not None:
        why = refuses_activation(act, shape[1])
    if why is not None or layer is None:
        return why
    for suffix, fact in layout.facts(weight, *shape).items():
        have = layer.facts.get(suffix)
        if have is None or not _same_values(have.shape, fact.shape):
            held = "nothing" if have is None else f"shape {list(have.shape)}"
            return f"{suffix} of {weight} must have shape {list(fact.shape)}, the files hold {held}"
    if act is not None and not act.dynamic:
        ranges = [suffix for suffix in optional_of(layout) if suffix in layer.facts]
        shifted = act.data_type == "int" and not act.symmetric
        if not RANGES.keys() & ranges or (shifted and _ZERO not in ranges):
            return f"its activations ({act}) are static, but the files hold no range for them"
    return None


def _same_values(have: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Tell whether shapes differ in dimensions of size 1 only, as those of scales do."""
    plain = [n for n in have if n != 1], [n for n in wanted if n != 1]
    return math.prod(have) == math.prod(wanted) and plain[0] == plain[1]
