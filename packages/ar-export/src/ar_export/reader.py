"""Read a checkpoint directory back: its configs, its tensors, its quantized weights."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ar_export.errors import ExportError
from ar_export.formats.base import Container
from ar_export.registry import formats
from ar_export.writer import ELEMENT_TYPES
from ar_kernels import KernelError, layout
from ar_kernels.hf.mxfp4 import METHOD as MXFP4
from ar_kernels.layouts.base import TensorFact, optional_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from ar_export.formats.base import Format, LayerEntry, Readable
    from ar_kernels import QuantizedWeight


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk; tensors are read when asked for.

    Attributes:
        path: its directory.
        config: config.json.
        quantization_config: None for a float checkpoint.
        format: name of the format, `float` without a quantization config.
        files: tensor name to file.
        facts: tensor name to shape and type.
        quantized: layer name to how it is stored.
    """

    path: Path
    config: Mapping[str, Any]
    quantization_config: Mapping[str, Any] | None
    format: str
    files: Mapping[str, Path]
    facts: Mapping[str, TensorFact]
    quantized: Mapping[str, LayerEntry]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape."""
        return {name: fact.shape for name, fact in self.facts.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self.files)

    @property
    def total_bytes(self) -> int:
        """Size of the weight files."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            ExportError: no such tensor, or its file is damaged.
        """
        if name not in self.files:
            msg = f"{self.path}: no tensor {name}"
            raise ExportError(msg)
        try:
            with safe_open(self.files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            msg = f"{self.files[name]}: tensor {name} cannot be read: {error}"
            raise ExportError(msg) from error

    def weight(self, layer: str) -> QuantizedWeight:
        """Return the quantized weight of a layer.

        Raises:
            ExportError: no such quantized layer, missing or ill-shaped tensors.
        """
        if layer not in self.quantized:
            msg = f"{self.path}: no quantized layer {layer}"
            raise ExportError(msg)
        entry = self.quantized[layer]
        spec = entry.spec
        order = layout(entry.layout)
        tensors = {}
        try:
            facts = dict(order.facts(spec, entry.rows, entry.columns))
            facts |= {k: v for k, v in optional_of(order).items() if f"{layer}.{k}" in self.files}
            for suffix, fact in facts.items():
                tensor = self.tensor(f"{layer}.{suffix}")
                if suffix in optional_of(order):  # other writers use the model's type, or a scalar
                    tensors[suffix] = tensor
                    continue
                if tuple(tensor.shape) != fact.shape or tensor.dtype != fact.dtype:
                    msg = (
                        f"{layer}.{suffix} is {tensor.dtype} {list(tensor.shape)}, but its scheme "
                        f"needs {fact.dtype} {list(fact.shape)}"
                    )
                    raise ExportError(msg)
                tensors[suffix] = tensor
            return order.unpack(tensors, spec, entry.rows, entry.columns)
        except KernelError as error:
            msg = f"{self.path}: layer {layer}: {error}"
            raise ExportError(msg) from error


def open_checkpoint(path: Path) -> Readable:
    """Return the checkpoint in a directory; reads headers and configs only.

    Raises:
        ExportError: not a checkpoint, damaged files, or a format that is not known here.
    """
    for container in formats().values():
        if isinstance(container, Container) and container.holds(path):
            return container.open(path)
    parts = read_parts(path)
    if parts.quantization is None:
        return Checkpoint(path, parts.config, None, "float", parts.files, parts.facts, {})
    if parts.quantization.get("quant_method") == MXFP4 and format_of(parts.quantization) is None:
        from ar_export.stacked import open_stacked  # made of this module's parts

        return open_stacked(path, parts)
    return assemble(path, parts)


@dataclass(frozen=True)
class Parts:
    """What the headers and configs of a directory say, before any of it is understood."""

    config: Mapping[str, Any]
    quantization: Mapping[str, Any] | None
    files: Mapping[str, Path]
    facts: Mapping[str, TensorFact]


def read_parts(path: Path) -> Parts:
    """Return the configs and headers of a directory with safetensors files.

    Raises:
        ExportError: not a checkpoint, or damaged files.
    """
    config = read_json(path / "config.json")
    quantization = config.get("quantization_config", config.get("quantization"))
    if quantization is None and (path / "quantization_config.json").is_file():
        quantization = read_json(path / "quantization_config.json")
    files, facts = _tensors(path)
    if quantization is not None and not isinstance(quantization, dict):
        msg = f"{path / 'config.json'}: quantization_config must be an object"
        raise ExportError(msg)
    return Parts(config, quantization, files, facts)


def assemble(
    path: Path, parts: Parts, kind: type[Checkpoint] | None = None, **more: Any
) -> Checkpoint:
    """Return the quantized checkpoint that the parts make, as a `Checkpoint` or a kind of it.

    Raises:
        ExportError: a format that is not known here, or config and tensors contradict each other.
    """
    assert parts.quantization is not None
    found = format_of(parts.quantization)
    if found is None:
        method = parts.quantization.get("quant_method")
        msg = f"{path}: no installed format reads quant_method {method!r}; see `ar formats`"
        raise ExportError(msg)
    try:
        layers = found.layers(parts.quantization, parts.facts)
    except ExportError as error:
        msg = f"{path}: {error}"
        raise ExportError(msg) from error
    return (kind or Checkpoint)(
        path,
        parts.config,
        parts.quantization,
        found.name,
        parts.files,
        parts.facts,
        layers,
        **more,
    )


def format_of(quantization: Mapping[str, Any]) -> Format | None:
    """Return the format that reads a `quantization_config`, or None.

    Third parties are asked before ours, as for every choice: a plugin may refine a method of ours
    (`quant_method` auto-round with a bit order of its own).
    """
    claims = (found for found in reversed(list(formats().values())) if found.reads(quantization))
    return next(claims, None)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        ExportError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "no such checkpoint" if not path.parent.is_dir() else f"no {path.name}"
        msg = f"{path.parent}: {what}; give the directory of a Transformers checkpoint"
        raise ExportError(msg) from error
    except (ValueError, OSError) as error:
        msg = f"{path} cannot be read as JSON: {error}"
        raise ExportError(msg) from error
    if not isinstance(value, dict):
        msg = f"{path} must hold a JSON object, not {type(value).__name__}"
        raise ExportError(msg)
    return value


def _tensors(path: Path) -> tuple[dict[str, Path], dict[str, TensorFact]]:
    index = path / "model.safetensors.index.json"
    names: list[str]
    declared: dict[str, str] | None = None
    if index.is_file():
        declared = read_json(index).get("weight_map")
        if not isinstance(declared, dict):
            msg = f"{index}: weight_map is missing or no object"
            raise ExportError(msg)
        names = sorted({str(v) for v in declared.values()})
    else:
        names = ["model.safetensors"]
    files: dict[str, Path] = {}
    facts: dict[str, TensorFact] = {}
    for name in names:
        file = _inside(path, name, index)
        for key, fact in _header(file).items():
            files[key], facts[key] = file, fact
    if declared is not None:
        _check_index(index, declared, files)
    return files, facts


def _inside(path: Path, name: str, index: Path) -> Path:
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        msg = f"{index}: names {name!r}, which is not a file beside it"
        raise ExportError(msg)
    file = path / name
    try:
        there = file.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        msg = f"{index}: names a file that cannot be: {error}"
        raise ExportError(msg) from error
    if not there:
        pickles = sorted(p.name for p in path.glob("*.bin"))
        only = f" Only pickles are there ({pickles[0]}), which are not read." if pickles else ""
        msg = f"{path}: weight file {name} is missing.{only}"
        raise ExportError(msg)
    return file


def _header(file: Path) -> dict[str, TensorFact]:
    try:
        with safe_open(file, framework="pt") as opened:
            out = {}
            for key in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(key)
                dtype = ELEMENT_TYPES.get(part.get_dtype())
                if dtype is None:
                    msg = f"{file}: tensor {key} is of type {part.get_dtype()}, not known here"
                    raise ExportError(msg)
                out[key] = TensorFact(tuple(part.get_shape()), dtype)
            return out
    except (SafetensorError, OSError) as error:
        msg = f"{file} is not a whole safetensors file: {error}"
        raise ExportError(msg) from error


def _check_index(index: Path, declared: Mapping[str, str], files: Mapping[str, Path]) -> None:
    wrong = [k for k, name in declared.items() if k not in files or files[k].name != name]
    unlisted = [k for k, n in Counter(files).items() if k not in declared]
    if wrong or unlisted:
        named = ", ".join([*wrong, *unlisted][:6])
        msg = f"{index} and the files differ on {len(wrong) + len(unlisted)} tensors: {named}"
        raise ExportError(msg)
