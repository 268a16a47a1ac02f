"""The processor of a model: as it is, without its video part, or an image processor alone.

Transformers' processors ask for torchvision where only their video part needs it. Image processors
have a second class that needs Pillow alone.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from ar_vlm.errors import VlmError
from ar_vlm.inputs.expand import Pair

_FAILURES = (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError)
"""What loading a processor raises when a part of it is missing."""


def load_processor(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return what turns text with marks and images into model inputs.

    Tried in turn: the processor; the processor without the parts that cannot be loaded here; the
    image processor and the tokenizer, with our own expansion of the image token.

    Args:
        path: directory of a Transformers checkpoint.
        trust_remote_code: code in the checkpoint may run.

    Raises:
        VlmError: none of these can be loaded, with the reason of each.
    """
    path = Path(path)
    reasons = []
    for name, load in (("processor", _whole), ("processor without video", _bare), ("parts", _pair)):
        try:
            return load(path, trust_remote_code)
        except _FAILURES as error:
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            reasons.append(f"{name}: {first[:160]}")
    msg = (
        f"no processor of {str(path)!r} can be loaded, so images cannot be used. "
        f"{'; '.join(reasons)}. Install what is missing (often torchvision), or give "
        "processor=callable, which turns a sample into model inputs."
    )
    raise VlmError(msg)


def _whole(path: Path, trust: bool) -> Any:  # noqa: FBT001
    from transformers import AutoProcessor

    found = AutoProcessor.from_pretrained(path, trust_remote_code=trust, local_files_only=True)
    if getattr(found, "image_processor", None) is None or not hasattr(found, "tokenizer"):
        msg = f"{type(found).__name__} takes no images"
        raise ValueError(msg)
    return found


def _bare(path: Path, trust: bool) -> Any:  # noqa: FBT001
    """Return the processor with None for each part but the image processor and the tokenizer."""
    cls = _processor_class(path)
    cls = _without_video(cls)
    loaders = {"tokenizer": _tokenizer, "image_processor": _image_processor}
    parts = [loaders[n](path, trust) if n in loaders else None for n in cls.get_attributes()]
    settings, _ = cls.get_processor_dict(path, local_files_only=True)
    return _lenient(cls).from_args_and_dict(parts, settings)


def _without_video(cls: Any) -> Any:
    """Return a processor class that does the same for images where a class asks for more."""
    import transformers

    name = _STAND_INS.get(cls.__name__)
    return cls if name is None else getattr(transformers, name)


_STAND_INS = {"SmolVLMProcessor": "Idefics3Processor"}
"""SmolVLM's own writes out the times of video frames in words, with a package for that."""


def _lenient(cls: Any) -> Any:
    """Return a subclass of a processor class that may do without some of its parts."""

    class Lenient(cls):
        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> object:
            """Return the class an argument is of; one that is not there is of any."""
            if argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    Lenient.__name__ = cls.__name__
    return Lenient


def _pair(path: Path, trust: bool) -> Pair:  # noqa: FBT001
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust, local_files_only=True)
    settings = _read(path / "processor_config.json")
    tokenizer = _tokenizer(path, trust)
    return Pair.of(_image_processor(path, trust), tokenizer, config, settings)


def _processor_class(path: Path) -> Any:
    """Return the class of the processor; a stand-in for a missing library is seen through."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    names = (_read(path / f).get("processor_class") for f in _FILES)
    name = next((n for n in names if n), None)
    kind = _read(path / "config.json").get("model_type")
    name = name or PROCESSOR_MAPPING_NAMES.get(kind)
    if not name:
        msg = f"model type {kind!r} has no processor class"
        raise ValueError(msg)
    found = getattr(transformers, name)
    if getattr(found, "is_dummy", False):
        module = transformers._class_to_module.get(name, "")  # noqa: SLF001
        found = getattr(importlib.import_module(f"transformers.{module}"), name)
    return found


_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def _tokenizer(path: Path, trust: bool) -> Any:  # noqa: FBT001
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust, local_files_only=True)


def _image_processor(path: Path, trust: bool) -> Any:  # noqa: FBT001
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(path, trust_remote_code=trust, local_files_only=True)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}
