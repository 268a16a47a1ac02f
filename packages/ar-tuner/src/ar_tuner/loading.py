"""Load a float model and its tokenizer from a directory, without network unless asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.hf.plain import plain_opening
from ar_schemes import ArError
from ar_tuner import registry
from ar_tuner.devices import checked_device
from ar_tuner.errors import TunerError
from ar_tuner.source import QUANTIZATION_KEYS
from ar_tuner.streaming import check_whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from ar_tuner.source import Source

DTYPES = ("auto", "bfloat16", "float16", "float32")


def check_source(path: Path, *, allow_download: bool) -> Path:
    """Return the directory of a checkpoint: the path itself, or a downloaded snapshot.

    Raises:
        TunerError: no such directory (and no consent to download), not a Transformers
            checkpoint, weights only as pickles, or quantized in a way that cannot be read.
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
    if is_quantized(read_config(path)):
        open_source(path)
        return path
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


def open_source(path: Path) -> Source:
    """Return the tensors of a checkpoint as floats, whatever they are stored as.

    Raises:
        TunerError: it is quantized in a way that no installed package reads, or it says that it
            is and holds no quantized layer.
    """
    config = read_config(path)
    if not is_quantized(config):
        return registry.open_source(path, config)
    method = next(config[k] for k in QUANTIZATION_KEYS if k in config)
    method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
    try:
        return registry.open_source(path, config)
    except ArError as error:
        msg = (
            f"model {str(path)!r} is already quantized (quant_method {method}) and cannot be read "
            f"as floats: {error}. Quantize the float checkpoint it was made from."
        )
        raise TunerError(msg) from error


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Tell whether a configuration is that of a quantized checkpoint."""
    return any(config.get(key) for key in QUANTIZATION_KEYS)


def load_meta(path: Path, *, trust_remote_code: bool) -> nn.Module:
    """Return the float model without weights (all parameters on the meta device).

    Raises:
        TunerError: code in the directory that may not run.
    """
    config = _model_config(path, trust_remote_code)
    for key in QUANTIZATION_KEYS:
        if hasattr(config, key):
            delattr(config, key)
    with torch.device("meta"):
        model = _auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


def load_model(
    path: Path, *, dtype: str, device: str = "cpu", trust_remote_code: bool
) -> tuple[nn.Module, Any]:
    """Return (model, tokenizer); the tokenizer is None where the directory has none.

    Raises:
        TunerError: an unknown dtype or device, weights that are missing from the checkpoint,
            code in the directory that may not run.
    """
    if dtype not in DTYPES:
        msg = f"dtype {dtype!r} is not allowed: use one of {', '.join(DTYPES)}"
        raise TunerError(msg)
    config = _model_config(path, trust_remote_code)
    model, report = plain_opening(_auto_class(config), config)(
        path,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    check_whole(path, report)
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


def float_type(name: str, config: Any, source: Source) -> torch.dtype:
    """Return the type to compute in: the one named, or with `auto` the checkpoint's own.

    Raises:
        TunerError: an unknown name.
    """
    if name not in DTYPES:
        msg = f"dtype {name!r} is not allowed: use one of {', '.join(DTYPES)}"
        raise TunerError(msg)
    if name != "auto":
        named: torch.dtype = getattr(torch, name)
        return named
    said = getattr(config, "dtype", None)
    return said if isinstance(said, torch.dtype) else source.dtype


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint.

    Raises:
        TunerError: there is none, or it is no JSON object.
    """
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


def _model_config(path: Path, trust: bool) -> Any:  # noqa: FBT001
    """Return the configuration of a checkpoint.

    Raises:
        TunerError: it is made by code in the directory, and that may not run.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    said = read_config(path)
    kind = said.get("model_type")
    if not trust and said.get("auto_map") and kind not in CONFIG_MAPPING:
        msg = (
            f"model {str(path)!r} is of type {kind!r}, which Transformers knows only through code "
            "in the directory. Read that code, and if you trust it, let it run: "
            "trust_remote_code=True (--trust-remote-code)."
        )
        raise TunerError(msg)
    return AutoConfig.from_pretrained(path, trust_remote_code=trust)


def _auto_class(config: Any) -> Any:
    """Return the Auto class that builds the model with its output head.

    Some types have several models: the one that the configuration names is taken, else, where it
    sees or hears, the one that does.
    """
    import transformers

    names = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    kinds = [kind for name in names if (kind := getattr(transformers, name, None)) is not None]
    remote = getattr(config, "auto_map", None) or {}
    wanted = set(getattr(config, "architectures", None) or ())
    fitting = [k for k in kinds if _class_names(k, config) or k.__name__ in remote]
    named = [k for k in fitting if _class_names(k, config) & wanted]
    if getattr(config, "vision_config", None) is not None:
        fitting.reverse()
    return next(iter(named or fitting), transformers.AutoModelForCausalLM)


def _class_names(kind: Any, config: Any) -> set[str]:
    """Return the names of the models that an Auto class has for a configuration."""
    if type(config) not in kind._model_mapping:  # noqa: SLF001
        return set()
    found = kind._model_mapping[type(config)]  # noqa: SLF001
    return {c.__name__ for c in (found if isinstance(found, (tuple, list)) else (found,))}


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(name, allow_patterns=patterns))
