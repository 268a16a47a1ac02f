"""Files of a checkpoint beside the weights: tokenizer, generation config, templates, processors."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_WRITTEN = {"config.json", "quantization_config.json", "quantize_config.json", "README.md"}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_KEPT = (".json", ".jsonl", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe")


def copy_side_files(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy what a reader needs beside weights and config; code only where the config names it."""
    for path in sorted(source.iterdir()):
        name = path.name
        if not path.is_file() or name.startswith(".") or name in _WRITTEN:
            continue
        if name.endswith((*_WEIGHTS, ".index.json")):
            continue
        code = path.suffix == ".py" and "auto_map" in config
        if code or path.suffix in _KEPT or name.upper().startswith("LICENSE"):
            shutil.copyfile(path, target / name)


def write_configs(
    target: Path, config: Mapping[str, Any], quantization: Mapping[str, Any] | None
) -> None:
    """Write config.json, and the quantization config a second time under its own name."""
    document = {k: v for k, v in config.items() if k != "quantization_config"}
    if quantization is not None:
        document["quantization_config"] = dict(quantization)
        write_json(target / "quantization_config.json", quantization)
    write_json(target / "config.json", document)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write plain values readably."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
