"""What the files of a checkpoint hold for each linear layer of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ar_kernels import registry
from ar_kernels.hf.config import LayerFormat
from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence

    from ar_kernels.hf.config import CheckpointConfig

_DENSE = frozenset({"weight", "bias"})


@dataclass
class StoredLayer:
    """The tensors of one module in the files: its name there, and shapes by suffix."""

    name: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """True when the module is stored as more than a float weight."""
        return not self.shapes.keys() <= _DENSE


def stored_shapes(files: Sequence[str | Path] | None) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of every tensor in safetensors files, read from their headers.

    None where that cannot be told: no files, or files of another kind.
    """
    if not files or any(Path(file).suffix != ".safetensors" for file in files):
        return None
    from safetensors import safe_open  # optional dependency, there when transformers is

    out: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            out |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    return out


def stored_layers(
    shapes: Mapping[str, tuple[int, ...]], rename: Callable[[str], str], keys: Container[str]
) -> dict[str, StoredLayer]:
    """Return what is stored for each module, by the module's name in the model.

    Args:
        shapes: shape of every tensor of the files.
        rename: key in the files to key in the model; they may differ (older prefixes, a head
            left out).
        keys: keys of the model's state dict.

    Raises:
        KernelError: packed tensors belong to a parameter that the model holds fused.
    """
    by_prefix: dict[str, StoredLayer] = {}
    for key, shape in shapes.items():
        prefix, _, suffix = key.rpartition(".")
        by_prefix.setdefault(prefix, StoredLayer(prefix)).shapes[suffix] = shape
    out: dict[str, StoredLayer] = {}
    fused: list[str] = []
    for prefix, layer in by_prefix.items():
        target = rename(f"{prefix}.weight")
        if target.endswith(".weight"):
            out[target.removesuffix(".weight")] = layer
        elif layer.packed and target in keys:
            fused.append(prefix)
    if fused:
        msg = (
            f"{len(fused)} quantized layers ({', '.join(fused[:3])}, ...) are parts of fused "
            "parameters in this model, which only open dense here. Fused experts are not "
            "supported yet; dequantize the checkpoint or leave the experts in 16 bit"
        )
        raise KernelError(msg)
    return out


def layer_formats(
    config: CheckpointConfig,
    layers: Mapping[str, tuple[int, int]],
    *,
    stored: Mapping[str, StoredLayer] | None,
    heads: Iterable[str],
    prefix: str,
) -> dict[str, LayerFormat]:
    """Return how each quantized layer is stored: the config says how, the files say whether.

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
    out: dict[str, LayerFormat] = {}
    bad: dict[str, str] = {}
    for layer, shape in layers.items():
        found = said.get(layer)
        if stored is not None:
            why, found = _settled(config, found, known.get(layer))
            if why is not None:
                bad[layer] = why
                continue
        if found is None or found.scheme.weight is None:
            continue
        why = _hurdle(found, shape, known.get(layer))
        if why is not None:
            bad[layer] = why
        out[layer] = found
    if bad:
        lines = "\n".join(f"  {layer}: {why}" for layer, why in bad.items())
        msg = f"{len(bad)} layers of this {config.method} checkpoint cannot be opened:\n{lines}"
        raise KernelError(msg)
    return out


def _settled(
    config: CheckpointConfig, said: LayerFormat | None, layer: StoredLayer | None
) -> tuple[str | None, LayerFormat | None]:
    """Return (contradiction or None, the layer's format) where the files are known.

    A float weight in the files is a float layer whatever the config says: writers leave odd
    shapes and tied heads alone without naming them.
    """
    if layer is None or not layer.packed:
        return None, None
    if said is None:
        said = config.default
    if said.scheme.weight is None:
        return "the config keeps it in 16 bit, the files hold packed tensors for it", None
    return None, LayerFormat(said.scheme, config.variant("g_idx" in layer.shapes))


def _hurdle(found: LayerFormat, shape: tuple[int, int], layer: StoredLayer | None) -> str | None:
    """Return why a layer cannot be opened, or None."""
    assert found.scheme.weight is not None
    layout = registry.layout(found.layout)
    why = layout.refuses(found.scheme.weight, *shape)
    if why is not None or layer is None:
        return why
    for suffix, fact in layout.facts(found.scheme.weight, *shape).items():
        have = layer.shapes.get(suffix)
        if have != fact.shape:
            held = "nothing" if have is None else f"shape {list(have)}"
            return (
                f"{suffix} of {found.scheme.weight} must have shape {list(fact.shape)}, the "
                f"files hold {held}"
            )
    return None
