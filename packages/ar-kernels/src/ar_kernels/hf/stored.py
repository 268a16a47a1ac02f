"""What the files of a checkpoint hold for each module of a model, read from their headers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ar_kernels.layouts.base import TensorFact

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_DENSE = frozenset({"weight", "bias"})
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Type names of safetensors headers; others are of no quantized layer."""


@dataclass
class StoredLayer:
    """The tensors of one module in the files: its name there, shapes and types by suffix."""

    name: str
    facts: dict[str, TensorFact] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """True when the module is stored as more than a float weight.

        Tensors beside one do not make it packed: a router may have two weights (`weight_1`).
        """
        weight = self.facts.get("weight")
        if weight is not None and weight.dtype.is_floating_point and weight.dtype.itemsize > 1:
            return False
        return not self.facts.keys() <= _DENSE


def stored_facts(files: Sequence[str | Path] | None) -> dict[str, TensorFact] | None:
    """Return shape and type of every tensor in safetensors files, read from their headers.

    None where that cannot be told: no files, or files of another kind.
    """
    if not files or any(Path(file).suffix != ".safetensors" for file in files):
        return None
    from safetensors import safe_open  # optional dependency, there when transformers is

    out: dict[str, TensorFact] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(key)
                kind = _TYPES.get(part.get_dtype(), torch.float32)
                out[key] = TensorFact(tuple(part.get_shape()), kind)
    return out


def stored_modules(facts: Mapping[str, TensorFact]) -> dict[str, StoredLayer]:
    """Return what is stored for each module, by the module's name in the files."""
    out: dict[str, StoredLayer] = {}
    for key, fact in facts.items():
        prefix, _, suffix = key.rpartition(".")
        out.setdefault(prefix, StoredLayer(prefix)).facts[suffix] = fact
    return out


def by_model_name(
    stored: Mapping[str, StoredLayer], rename: Callable[[str], str]
) -> dict[str, StoredLayer]:
    """Return what is stored for each module by the module's name in the model.

    `rename` gives the key in the model for a key of the files; they may differ (older prefixes, a
    head left out). Modules that the model fuses are left out.
    """
    targets = {prefix: rename(f"{prefix}.weight") for prefix in stored}
    return {
        target.removesuffix(".weight"): stored[prefix]
        for prefix, target in targets.items()
        if target.endswith(".weight")
    }
