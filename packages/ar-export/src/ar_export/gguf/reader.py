"""Read a GGUF file back: tensors and exact quantized weights under the checkpoint's names."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ar_export.errors import ExportError
from ar_export.formats.base import LayerEntry
from ar_export.gguf.architectures import Architecture, architecture_of
from ar_export.gguf.mix import PRESETS
from ar_export.gguf.mmproj.families import family_of
from ar_export.gguf.mmproj.reader import open_mmproj
from ar_export.gguf.multimodal import WRAPPER, described, sees, text_of
from ar_export.gguf.opening import open_reader
from ar_export.gguf.rows import reordered, row_order
from ar_kernels import KernelError, layout
from ar_kernels.layouts.base import TensorFact
from ar_schemes import scheme

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import gguf
    from torch import Tensor

    from ar_export.gguf.mmproj.reader import Mmproj
    from ar_kernels import QuantizedWeight

_STACKED = 3
_EYES = "mmproj-"
"""Begin of the name of the file that holds the vision part."""
_NUMBER = re.compile(r"\.experts\.(\d+)\.")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufCheckpoint:
    """A GGUF file, read like any other checkpoint (see `ar_export.reader.Checkpoint`)."""

    path: Path
    config: Mapping[str, Any]
    facts: Mapping[str, TensorFact]
    files: Mapping[str, Path]
    quantized: Mapping[str, LayerEntry]
    architecture: Architecture
    stored: Mapping[str, Any] = field(repr=False)
    text: Mapping[str, Any] = field(repr=False)
    eyes: Mmproj | None = None
    format: str = "gguf"
    quantization_config: Mapping[str, Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self.files)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape."""
        return {name: fact.shape for name, fact in self.facts.items()}

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def tensor(self, name: str) -> Tensor:
        """Return a float tensor, in the order of rows and with the offsets of the checkpoint.

        Raises:
            ExportError: no such tensor, or it is quantized.
        """
        if self.eyes is not None and name in self.eyes.parts:
            return self.eyes.tensor(name)
        found = self.stored.get(name)
        if found is None:
            msg = f"{self.path}: no tensor {name}"
            raise ExportError(msg)
        kind = found.tensor_type.name
        if kind not in _FLOATS:
            msg = f"{self.path}: {name} is quantized ({kind})"
            raise ExportError(msg)
        raw = torch.from_numpy(found.data.copy())
        tensor = raw.view(torch.bfloat16) if kind == "BF16" else raw
        tensor = tensor.reshape(_shape(found))
        if tensor.ndim == _STACKED:
            tensor = tensor[int(_NUMBER.findall(name)[-1])]
        if self.architecture.conv1d and tensor.ndim == 2 and "_embd" not in found.name:  # noqa: PLR2004
            tensor = tensor.t()
        order = row_order(found.name, self.architecture, self.text)
        if order is not None:
            tensor = tensor[order.argsort()]
        if self.architecture.norm_offset and found.name.endswith("norm.weight"):
            tensor = tensor - self.architecture.norm_offset
        return tensor

    def weight(self, layer: str) -> QuantizedWeight:
        """Return the quantized weight of a layer.

        Raises:
            ExportError: no such quantized layer, or its blocks are damaged.
        """
        if layer not in self.quantized:
            msg = f"{self.path}: no quantized layer {layer}"
            raise ExportError(msg)
        entry, found = self.quantized[layer], self.stored[f"{layer}.weight"]
        assert entry.scheme.weight is not None
        data = found.data
        if len(_shape(found)) == _STACKED:
            data = data[int(_NUMBER.findall(f"{layer}.")[-1])]
        blocks = torch.from_numpy(data.copy()).reshape(entry.rows, -1)
        try:
            made = layout(entry.layout).unpack(
                {"blocks": blocks}, entry.scheme.weight, entry.rows, entry.columns
            )
        except KernelError as error:
            msg = f"{self.path}: layer {layer}: {error}"
            raise ExportError(msg) from error
        order = row_order(found.name, self.architecture, self.text)
        return made if order is None else reordered(made, order.argsort())


def open_gguf(path: Path) -> GgufCheckpoint:
    """Return the GGUF checkpoint in a file (with config.json beside it) or in a directory.

    Raises:
        ExportError: no or several files, a damaged one, or an architecture not known here.
    """
    file = _file(path)
    folder = file.parent
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{file}: the model's config.json must lie beside it to read it back: {error}"
        raise ExportError(msg) from error
    text = text_of(config)
    arch = architecture_of(text)
    if importlib.util.find_spec("gguf") is None:
        msg = "GGUF files need the gguf package: pip install 'ar-export[gguf]'"
        raise ExportError(msg)
    try:
        reader = open_reader(file)
        tensors, wrapper = reader.tensors, _wrapper(reader)
    except (ValueError, OSError, IndexError, KeyError, UnicodeDecodeError) as error:
        msg = f"{file} is not a whole GGUF file: {error}"
        raise ExportError(msg) from error
    stored, facts, quantized = {}, {}, {}
    for found in tensors:
        begin, _, inside = arch.key_of(found.name).partition(".")
        key = f"{wrapper.get(begin, begin)}.{inside}"
        shape, kind = _shape(found), found.tensor_type.name
        if kind in _FLOATS:
            for name in _experts(key, shape):
                stored[name], facts[name] = found, TensorFact(shape[-2:], _FLOATS[kind])
            continue
        if kind not in PRESETS or len(shape) not in (2, _STACKED):
            msg = f"{file}: {found.name} is of type {kind} {list(shape)}, which is not read here"
            raise ExportError(msg)
        preset = scheme(PRESETS[kind])
        for name in _experts(key, shape):
            if not name.endswith(".weight"):
                msg = f"{file}: {found.name!r} is of type {kind}, but no layer's weight"
                raise ExportError(msg)
            stored[name], facts[name] = found, TensorFact(shape[-2:], torch.uint8)
            layer, order = name.removesuffix(".weight"), f"gguf_{kind.lower()}"
            quantized[layer] = LayerEntry(preset, shape[-2], shape[-1], order)
    files = dict.fromkeys(stored, file)
    eyes = _eyes(folder, config)
    for key in () if eyes is None else eyes.parts:
        assert eyes is not None
        facts[key], files[key] = TensorFact(*eyes.fact(key)), eyes.path
    return GgufCheckpoint(
        folder, config, facts, files, quantized, arch, stored=stored, text=text, eyes=eyes
    )


def _wrapper(reader: gguf.GGUFReader) -> dict[str, str]:
    """Return what stands for the begin of names in the checkpoint, where that says so."""
    own = (f for f in reader.fields.values() if f.name.startswith(WRAPPER))
    return {f.name.removeprefix(WRAPPER): bytes(f.parts[f.data[0]]).decode() for f in own}


def _eyes(folder: Path, config: Mapping[str, Any]) -> Mmproj | None:
    """Return the vision part in the file beside a text model, where there is one of ours."""
    files = sorted(folder.glob(f"{_EYES}*.gguf"))
    if not sees(config) or not files:
        return None
    whole = described(config)
    family = family_of(whole)
    assert family is not None
    try:
        return open_mmproj(files[0], family, whole)
    except (ValueError, OSError, IndexError, KeyError, UnicodeDecodeError) as error:
        msg = f"{files[0]} is not a whole GGUF file: {error}"
        raise ExportError(msg) from error


def _shape(found: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(found.shape.tolist()))


def _experts(key: str, shape: tuple[int, ...]) -> list[str]:
    """Return the checkpoint's names of a tensor: stacked experts have one each."""
    if len(shape) != _STACKED:
        return [key]
    head, _, tail = key.partition(".experts.")
    return [f"{head}.experts.{i}.{tail}" for i in range(shape[0])]


def is_gguf(path: Path) -> bool:
    """Tell whether a path is a GGUF file or a directory with one and no safetensors."""
    if path.suffix == ".gguf":
        return True
    return path.is_dir() and any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))


def _file(path: Path) -> Path:
    inside = (file for file in sorted(path.glob("*.gguf")) if not file.name.startswith(_EYES))
    found = [path] if path.suffix == ".gguf" else list(inside)
    if len(found) != 1 or not found[0].is_file():
        listed = ", ".join(p.name for p in found) or "none"
        msg = f"{path}: one GGUF file is needed, found {listed}"
        raise ExportError(msg)
    return found[0]
