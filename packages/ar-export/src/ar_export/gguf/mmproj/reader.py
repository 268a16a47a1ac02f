"""Reads the vision part back under the names of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_export.gguf.mmproj.writer import SOURCES
from ar_export.gguf.opening import open_reader
from ar_export.gguf.rows import pairs_apart

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from ar_export.gguf.mmproj.families import Family

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Mmproj:
    """The tensors of an mmproj file by their names in the checkpoint.

    Attributes:
        path: of the file.
        parts: what each tensor of the checkpoint became, in the file's order.
        family: names and changes of its tensors.
        heads: attention heads of the tower.
    """

    path: Path
    parts: Mapping[str, tuple[Any, ...]]
    family: Family
    heads: int

    def fact(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and type of a tensor without reading it."""
        first, count = self.parts[key][0], len(self.parts[key])
        shape = [int(n) for n in reversed(first.shape.tolist())]
        if count > 1 and self._stacked(key):
            shape.insert(2, count)
        else:
            shape[0] *= count
        return tuple(shape), _FLOATS[first.tensor_type.name]

    def tensor(self, key: str) -> Tensor:
        """Return a tensor as it is in the checkpoint."""
        tower = self.family.tower
        found = []
        for part in self.parts[key]:
            tensor = torch.from_numpy(part.data.copy())
            if part.tensor_type.name == "BF16":
                tensor = tensor.view(torch.bfloat16)
            if tower.permuted and part.name.split(".")[-2] in ("attn_q", "attn_k"):
                tensor = tensor[pairs_apart(tensor.shape[0], self.heads).argsort()]
            found.append(tensor - tower.offsets.get(part.name, 0.0))
        return torch.stack(found, 2) if len(found) > 1 and self._stacked(key) else torch.cat(found)

    def _stacked(self, key: str) -> bool:
        return str(self.parts[key][-1].name).endswith(".weight.1")


def open_mmproj(path: Path, family: Family, config: Mapping[str, Any]) -> Mmproj | None:
    """Return the vision part in a file; None where it does not say what its tensors were.

    Args:
        path: of the file.
        family: the model's family.
        config: its configuration with all defaults.
    """
    read = open_reader(path)
    field = read.fields.get(SOURCES)
    if field is None:
        return None
    names = [bytes(field.parts[i]).decode() for i in field.data]
    parts: dict[str, list[Any]] = {}
    for name, tensor in zip(names, read.tensors, strict=True):
        if name:
            parts.setdefault(name, []).append(tensor)
    vision = config["vision_config"]
    heads = int(vision.get("num_attention_heads") or vision.get("num_heads"))
    return Mmproj(path, {k: tuple(v) for k, v in parts.items()}, family, heads)
