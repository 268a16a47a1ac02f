"""Files of a checkpoint beside the weights: tokenizer, generation config, templates, processors."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_WRITTEN = {
    "config.json",
    "quantization_config.json",
    "quantize_config.json",
    "quant_config.json",
    "README.md",  # describes the float model
}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_KEPT = (".json", ".jsonl", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe", ".spm")
_VOICES = "spk_dict.pt"  # of Qwen2.5-Omni, whose class does not open without
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
_FOLDERS = ("additional_chat_templates",)


def copy_side_files(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy what a reader needs beside weights and config; code only where the config names it."""
    for path in sorted(source.iterdir()):
        if path.is_file() and _wanted(path, config):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, target / path.name, copy_function=shutil.copyfile)


def _wanted(path: Path, config: Mapping[str, Any]) -> bool:
    name = path.name
    if name == _VOICES:
        return True
    if name.startswith(".") or name in _WRITTEN or name.endswith((*_WEIGHTS, ".index.json")):
        return False
    if path.suffix == ".py":
        return "auto_map" in config
    return path.suffix in _KEPT or name.upper().startswith(_LEGAL)


def write_configs(
    target: Path,
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None,
    *,
    names: tuple[str, ...] = (),
) -> None:
    """Write config.json, and the quantization config again under names that readers look for."""
    document = {k: v for k, v in config.items() if k != "quantization_config"}
    if quantization is not None:
        document["quantization_config"] = dict(quantization)
        for name in ("quantization_config.json", *names):
            write_json(target / name, quantization)
    write_json(target / "config.json", document)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write plain values readably."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
