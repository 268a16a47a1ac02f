"""Tiny random models of any type: the type's own configuration with its sizes made small.

Sizes go by the names that configurations share (`tiny.toml`); the types whose sizes depend on each
other have a table of their own (`families.toml`). Nothing is downloaded.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import tomllib
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

_FIXED_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
_FIXED_TOKENS |= {"cls_token_id": 2, "decoder_start_token_id": 2}
_TOKEN = re.compile(
    r"(token_id|token_index|patch_id|_start_id|_end_id|newline_id|im_start_id|im_end_id|_token)$"
)
_FIRST_TOKEN = 10
_DEEPEST = 4
_LARGEST = 50.0
"""A parameter with larger numbers than this has not been initialised."""
_SPREAD = 0.05
"""Standard deviation of random matrices: outputs of blocks then weigh as much as their inputs."""


class CannotBuildError(TunerError):
    """No tiny model of this type can be made here; the message says why."""


def text_types() -> dict[str, str]:
    """Return the types of causal language models, with the names of their classes."""
    from transformers.models.auto import modeling_auto as auto

    return _names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_text_types() -> dict[str, str]:
    """Return the types of models that also see or hear, with the names of their classes."""
    from transformers.models.auto import modeling_auto as auto

    return _names(auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) | _names(
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    )


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return a small configuration of a type.

    Args:
        model_type: as in `config.json`.
        **changes: fields to set otherwise; dicts change fields of sub-configurations.

    Raises:
        CannotBuildError: no such type, or its configuration refuses the sizes.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        msg = f"model type {model_type!r} is not known to the installed Transformers"
        raise CannotBuildError(msg)
    kind = CONFIG_MAPPING[model_type]
    fields = _merged(_shrunk(kind, "text", 0), _tables()["families"].get(model_type, {}))
    fields = _merged(fields, changes)
    fields.pop("model_type", None)
    try:
        return kind(**fields)
    except _mistakes() as error:
        raise CannotBuildError(_said(model_type, error)) from error


def tiny_model(model_type: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a random model of a type on the CPU, float32, in evaluation mode.

    A type of both kinds is built with its eyes: as the class of `image_text_types`.

    Args:
        model_type: as in `config.json`.
        seed: of the weights.
        **changes: see `tiny_config`.

    Raises:
        CannotBuildError: the type cannot be built from sizes alone, or needs a package that is
            not installed.
    """
    import transformers

    name = (text_types() | image_text_types()).get(model_type)
    if name is None:
        msg = f"model type {model_type!r} is no language model of the installed Transformers"
        raise CannotBuildError(msg)
    try:
        kind = getattr(transformers, name)
        config = _fitting(kind, tiny_config(model_type, **changes))
        _check_size(kind, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = kind(config).float().eval()
    except _mistakes() as error:
        raise CannotBuildError(_said(model_type, error)) from error
    _fill(model, seed)
    return model.requires_grad_(requires_grad=False)


def first_word() -> int:
    """Return the first token id that is no special token in a tiny model."""
    first: int = _tables()["limits"]["first_text_token"]
    return first


def tiny_rows(count: int = 8, length: int = 24, *, seed: int = 1) -> Tensor:
    """Return random token rows [count, length] without special tokens."""
    first, last = first_word(), _tables()["limits"]["vocabulary"] - 4
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(first, last, (count, length), generator=generator)


def _mistakes() -> tuple[type[Exception], ...]:
    """Return what classes raise that cannot do with the sizes, or lack a package."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        *(StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, IndexError),
        *(ImportError, RuntimeError, ZeroDivisionError, AssertionError),
    )


def _said(model_type: str, error: Exception) -> str:
    text = " ".join(f"{error}".split())
    return f"{model_type}: {type(error).__name__}: {text}"


@functools.cache
def _tables() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for file in ("tiny.toml", "families.toml"):
        text = resources.files("ar_tuner.testing").joinpath(file).read_text(encoding="utf-8")
        out |= tomllib.loads(text)
    return out


def _names(mapping: Mapping[str, Any]) -> dict[str, str]:
    return {k: v if isinstance(v, str) else v[0] for k, v in mapping.items()}


def _shrunk(kind: Any, role: str, depth: int) -> dict[str, Any]:
    """Return the fields of a configuration class that are to be small, sub-configurations too."""
    sizes, optional = _tables()["sizes"][role], _tables()["optional"]["names"]
    other = {shown: stored for stored, shown in _aliases(kind).items()}
    out: dict[str, Any] = {}
    token = _FIRST_TOKEN
    defaults = _defaults(kind)
    for name, default in defaults.items():
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        if name in _FIXED_TOKENS:
            out[name] = _FIXED_TOKENS[name]
        elif _TOKEN.search(name) and number:
            out[name] = token
            token += 1
        else:
            size = sizes.get(name, sizes.get(other.get(name, "")))
            if size is not None and (number or (default is None and name in optional)):
                out[name] = float(size) if isinstance(default, float) else size
    if "kv_lora_rank" in defaults and "num_key_value_heads" in out:  # latent attention shares none
        out["num_key_value_heads"] = sizes["num_attention_heads"]
    image, patch = defaults.get("image_size"), defaults.get("patch_size")
    if role == "vision" and isinstance(image, int) and isinstance(patch, int):
        out["image_size"] = _tables()["limits"]["image_patches"] * patch
    return out | (_inner(kind, depth) if depth < _DEEPEST else {})


def _inner(kind: Any, depth: int) -> dict[str, Any]:
    """Return the shrunk sub-configurations of a class, those that it always has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    out: dict[str, Any] = {}
    for key, spec in (getattr(kind, "sub_configs_defaults", None) or {}).items():
        inner: Any = spec.config_class
        if spec.optional:
            continue
        if inner.__name__ == "AutoConfig" or not dataclasses.is_dataclass(inner):
            if spec.model_type is None:
                continue
            inner = CONFIG_MAPPING[spec.model_type]
        fields = _shrunk(inner, _role(key), depth + 1)
        fields["model_type"] = spec.model_type or inner.model_type
        out[key] = {**(spec.init_kwargs or {}), **fields}
    return out


def _role(key: str) -> str:
    roles: dict[str, str] = _tables()["roles"]
    return next((role for role, words in roles.items() if re.search(words, key)), "text")


def _aliases(kind: Any) -> dict[str, str]:
    return dict(getattr(kind, "attribute_map", None) or {})


def _defaults(kind: Any) -> dict[str, Any]:
    return {
        f.name: None if f.default is dataclasses.MISSING else f.default
        for f in dataclasses.fields(kind)
    }


def _merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(fields)
    for key, value in changes.items():
        inner = out.get(key)
        both = isinstance(value, dict) and isinstance(inner, dict)
        out[key] = _merged(inner, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return out


def _fitting(kind: Any, config: Any) -> Any:
    """Return the configuration that a class takes: a part of the whole, for some."""
    wanted = getattr(kind, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = (getattr(config, n, None) for n in ("text_config", "thinker_config", "llm_config"))
    return next((part for part in parts if isinstance(part, wanted)), config)


def _check_size(kind: Any, config: Any) -> None:
    with torch.device("meta"):
        hollow = kind(copy.deepcopy(config))
    sizes = {name: p.numel() for name, p in hollow.named_parameters()}
    limit = _tables()["limits"]["parameters"]
    if (total := sum(sizes.values())) > limit:
        largest = sorted(sizes, key=sizes.__getitem__)[-3:]
        msg = f"{total} parameters are more than {limit}: {', '.join(largest)}"
        raise ValueError(msg)


def _fill(model: nn.Module, seed: int) -> None:
    """Give every matrix random numbers, and every parameter that was left as it lay in memory.

    Classes start gates, routers and fused experts from zeros or from uninitialised memory.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fresh = torch.randn(parameter.shape, generator=generator) * _spread(parameter)
            odd = not torch.isfinite(parameter).all() or parameter.abs().max() > _LARGEST
            shut = not parameter.any() and not name.endswith("bias")  # a gate that lets nothing by
            if parameter.numel() and (parameter.ndim > 1 or odd or shut):
                parameter.copy_(fresh)


def _spread(parameter: Tensor) -> float:
    """Return how far random numbers spread: stacks of convolutions must not fade out."""
    image = parameter.ndim == 4  # noqa: PLR2004 - a convolution over height and width
    return _SPREAD if not image else float(parameter[0].numel() ** -0.5)
