"""Which checkpoints the plugins take from an engine. Data in, data out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_kernels.hf.config import CheckpointConfig, LayerFormat, parse
from ar_kernels.weight import KernelError
from ar_schemes import ArError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ar_schemes import TensorSpec

METHOD = "ar_kernels"
"""What an engine's `--quantization` calls us."""
_BITS = (4, 8)
_GROUPS = (-1, 32, 64, 128)
"""What the engines' own kernels take of GPTQ's and AWQ's formats."""
_WORDS: dict[str, tuple[int, int | None]] = {"qweight": (0, 1), "qzeros": (0, 1), "scales": (0, 1)}
_DIMENSIONS: dict[str, dict[str, tuple[int, int | None]]] = {
    "gptq": _WORDS,
    "gptq_v2": _WORDS,
    "gptq_g_idx": {**_WORDS, "g_idx": (0, None)},
    "gptq_v2_g_idx": {**_WORDS, "g_idx": (0, None)},
    "awq": _WORDS,
    "ct_mxfp4": {"weight_packed": (1, 0), "weight_scale": (1, 0)},
    "mx_int": {"weight_packed": (1, 0), "weight_scale": (1, 0)},
}
"""Layout to tensor to (dimension of the input, of the output): what can be cut for parallelism.
None where it has none."""


def dimensions(layout: str) -> Mapping[str, tuple[int, int | None]]:
    """Return which dimension of each tensor follows the input and which the output.

    Raises:
        KernelError: tensors of this layout cannot be loaded by an engine.
    """
    if layout not in _DIMENSIONS:
        msg = f"checkpoints in layout {layout} cannot be served; known: {', '.join(_DIMENSIONS)}"
        raise KernelError(msg)
    return _DIMENSIONS[layout]


def claimed(config: Mapping[str, Any], user: str | None) -> str | None:
    """Return our name where we should serve a checkpoint, else None.

    Args:
        config: its `quantization_config`.
        user: what the user asked the engine for, None: nothing.
    """
    if user == METHOD:
        return METHOD
    if user is not None:
        return None
    try:
        understood = parse(config)
        default = understood.default
    except ArError:
        return None
    spec = default.scheme.weight
    if config.get("desc_act"):  # channels in another order than that of the input
        return None
    if spec is None or default.scheme.activation is not None:
        return None
    if default.layout not in _DIMENSIONS or _has_kernels(spec):
        return None
    return METHOD


def format_of(
    config: CheckpointConfig, prefix: str, fused: Mapping[str, Sequence[str]]
) -> LayerFormat | None:
    """Return how a layer of an engine's model is stored, None where it is not quantized.

    Args:
        config: the checkpoint's.
        prefix: full name of the layer in the engine's model.
        fused: last part of a fused layer's name to those of its members in the checkpoint.

    Raises:
        KernelError: members of a fused layer differ, or activations are quantized.
    """
    parent, dot, own = prefix.rpartition(".")
    members = [f"{parent}{dot}{name}" for name in fused.get(own, (own,))]
    said = config.resolve({name: (name,) for name in members})
    formats = {name: said.get(name) for name in members}
    found = {f if f is None or f.scheme.weight is not None else None for f in formats.values()}
    if len(found) > 1:
        shown = ", ".join(f"{name}: {f and f.scheme.weight}" for name, f in formats.items())
        msg = f"{prefix} is one layer to the engine, but its parts are quantized unlike: {shown}"
        raise KernelError(msg)
    (only,) = found
    if only is not None and only.scheme.activation is not None:
        msg = f"{prefix}: activations are quantized to {only.scheme.activation}; weights only here"
        raise KernelError(msg)
    return only


def _has_kernels(spec: TensorSpec) -> bool:
    return spec.data_type == "int" and spec.bits in _BITS and spec.group_size in _GROUPS
