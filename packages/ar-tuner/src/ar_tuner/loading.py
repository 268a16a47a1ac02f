"""Load a float model and its tokenizer from a directory, without network unless asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from torch import nn

DTYPES = ("auto", "bfloat16", "float16", "float32")


def check_source(path: Path, *, allow_download: bool) -> Path:
    """Return the directory of a checkpoint: the path itself, or a downloaded snapshot.

    Raises:
        TunerError: no such directory (and no consent to download), not a float Transformers
            checkpoint, or weights only as pickles.
    """
    if not path.exists() and allow_download:
        return _download(str(path))
    if not path.is_dir():
        hint = (
            "To fetch it from the Hugging Face hub, allow downloads (--allow-download)."
            if not path.exists() and len(path.parts) == 2  # noqa: PLR2004 - owner/name
            else "Give the directory of a Transformers checkpoint."
        )
        what = "is a file" if path.exists() else "does not exist"
        msg = f"model {str(path)!r} {what}. {hint}"
        raise TunerError(msg)
    config = _config(path)
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        msg = (
            f"model {str(path)!r} is already quantized (quant_method {method}); "
            "quantize the float checkpoint it was made from"
        )
        raise TunerError(msg)
    names = {p.name for p in path.iterdir()}
    if not names & {"model.safetensors", "model.safetensors.index.json"}:
        pickles = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth")))
        found = f" Only pickles are there ({', '.join(pickles[:3])})." if pickles else ""
        msg = (
            f"model {str(path)!r} has no model.safetensors and no index of shards.{found} "
            "Save it with save_pretrained(), which writes safetensors."
        )
        raise TunerError(msg)
    return path


def load_meta(path: Path, *, trust_remote_code: bool) -> nn.Module:
    """Return the model without weights (all parameters on the meta device)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = _auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


def load_model(
    path: Path, *, dtype: str, device: str = "cpu", trust_remote_code: bool
) -> tuple[nn.Module, Any]:
    """Return (model, tokenizer); the tokenizer is None where the directory has none.

    Raises:
        TunerError: an unknown dtype or device, weights that are missing from the checkpoint.
    """
    from transformers import AutoConfig

    if dtype not in DTYPES:
        msg = f"dtype {dtype!r} is not allowed: use one of {', '.join(DTYPES)}"
        raise TunerError(msg)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    model, report = _auto_class(config).from_pretrained(
        path,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        msg = (
            f"model {str(path)!r} lacks {len(missing)} tensors that its architecture needs "
            f"({', '.join(missing[:4])}); they would be random. Check that the checkpoint is whole."
        )
        raise TunerError(msg)
    return model.to(checked_device(device)), load_tokenizer(path, trust_remote_code)


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:  # noqa: FBT001, FBT002
    """Return the tokenizer in a directory, or None where there is none."""
    from transformers import AutoTokenizer

    names = {p.name for p in path.iterdir()}
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"}:
        return None
    return AutoTokenizer.from_pretrained(
        path, trust_remote_code=trust_remote_code, local_files_only=True
    )


def checked_device(name: str) -> torch.device:
    """Return a device that this machine has.

    Raises:
        TunerError: it has not, or the name means nothing to torch.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        msg = f"device {name!r} cannot be used here: {reason}"
        raise TunerError(msg) from error
    return device


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        msg = f"model {str(path)!r} has no config.json: not a Transformers checkpoint"
        raise TunerError(msg) from error
    except ValueError as error:
        msg = f"{file} is not JSON: {error}"
        raise TunerError(msg) from error
    if not isinstance(config, dict):
        msg = f"{file} must hold a JSON object, not {type(config).__name__}"
        raise TunerError(msg)
    return config


def _auto_class(config: Any) -> Any:
    """Return the Auto class that builds the model with its output head."""
    import transformers

    kinds = [transformers.AutoModelForCausalLM]
    multimodal = getattr(transformers, "AutoModelForImageTextToText", None)
    if multimodal is not None and getattr(config, "vision_config", None) is not None:
        kinds.insert(0, multimodal)
    for kind in kinds:
        if type(config) in kind._model_mapping or getattr(config, "auto_map", None):  # noqa: SLF001
            return kind
    return transformers.AutoModelForCausalLM


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(name, allow_patterns=patterns))
