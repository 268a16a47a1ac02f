"""Names of tensors in the source checkpoint for the parameters of the model in memory."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from safetensors import safe_open

from ar_schemes import LayerInfo
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ar_tuner.source import Source
    from ar_tuner.wiring import Piece


_TYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool", "U8": "uint8"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
}


def source_files(directory: Path) -> dict[str, Path]:
    """Return the file of every tensor of a safetensors checkpoint, in file order.

    Raises:
        TunerError: no safetensors file, or an index that names a file outside the directory.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name in set(weight_map.values()):
            if "/" in name or "\\" in name or not (directory / name).is_file():
                msg = f"{index}: names the file {name!r}, which is not a file beside it"
                raise TunerError(msg)
        return {key: directory / name for key, name in weight_map.items()}
    single = directory / "model.safetensors"
    if not single.is_file():
        msg = f"{directory}: no model.safetensors and no index of shards; pickles are not read"
        raise TunerError(msg)
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def map_names(model_keys: Iterable[str], source_keys: Iterable[str]) -> dict[str, str]:
    """Return model key to source key: the same name, or the only one that differs by a prefix.

    Keys without a counterpart (tied heads, say) are left out.
    """
    source = list(source_keys)
    known = set(source)
    by_tail: dict[str, list[str]] = {}
    for key in source:
        by_tail.setdefault(_tail(key), []).append(key)
    out = {}
    for key in model_keys:
        if key in known:
            out[key] = key
            continue
        near = [
            k for k in by_tail.get(_tail(key), []) if k.endswith(f".{key}") or key.endswith(f".{k}")
        ]
        if len(near) == 1:
            out[key] = near[0]
    return out


def _tail(key: str) -> str:
    return ".".join(key.split(".")[-2:])


def kept_in_parts(
    layers: Iterable[LayerInfo], pieces: Mapping[str, Piece], model: object
) -> list[LayerInfo]:
    """Return layers with those kept in high precision that are no tensor of the checkpoint's own.

    Args:
        layers: layers of the model.
        pieces: what makes the model's tensors of those of the checkpoint, by the former's names.
        model: the model, which knows the weights that are another layer's.
    """
    shared = getattr(model, "all_tied_weights_keys", None) or {}
    out = []
    for layer in layers:
        piece = pieces.get(f"{layer.name}.weight")
        parts = 1 if piece is None or piece.convert is None else len(piece.sources)
        why = None
        if parts > 1:
            why = f"joined of {parts} tensors of the checkpoint, which have no layers of their own"
        elif piece is None and f"{layer.name}.weight" in shared and layer.block is not None:
            why = "its weight is another layer's: quantized there"
        if why is not None and layer.keep is None:
            layer = dataclasses.replace(layer, keep=why)  # noqa: PLW2901
        out.append(layer)
    return out


def strangers(
    source: Source, unknown: Iterable[str], layers: Sequence[LayerInfo]
) -> list[LayerInfo]:
    """Return the layers of a checkpoint that the model in memory does not have.

    Transformers leaves out the layers of multi-token prediction, for one. They are copied as they
    are, and a plan that has them makes every format declare them.

    Args:
        source: the checkpoint.
        unknown: its tensors that the model does not have.
        layers: layers of the model.
    """
    fused = tuple(f"{layer.name}." for layer in layers if layer.copies > 1)
    out = []
    for key in unknown:
        if not key.endswith(".weight") or key.startswith(fused):
            continue
        shape = source.shape(key)
        if len(shape) != 2:  # noqa: PLR2004
            continue
        name = key.removesuffix(".weight")
        out.append(
            LayerInfo(
                name,
                shape[0],
                shape[1],
                block=name.rpartition(".")[0] or name,
                keep="it is in the checkpoint but not in the model (copied as it is)",
            )
        )
    return out


def tensor_facts(files: Mapping[str, Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and type (`bfloat16`) of every tensor of a checkpoint, from its headers."""
    by_file: dict[Path, list[str]] = {}
    for key, path in files.items():
        by_file.setdefault(path, []).append(key)
    out = {}
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                part = file.get_slice(name)
                out[name] = (tuple(part.get_shape()), _TYPES.get(part.get_dtype(), "uint8"))
    return out


def source_tensors(files: Mapping[str, Path], keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, tensor) of a checkpoint one at a time, in the order of its files."""
    wanted = set(keys)
    by_file: dict[Path, list[str]] = {}
    for key, path in files.items():
        if key in wanted:
            by_file.setdefault(path, []).append(key)
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
