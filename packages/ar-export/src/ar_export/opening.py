"""Open a checkpoint as a model: in its own kernels where there are any, else dequantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ar_export.errors import ExportError
from ar_export.reader import open_checkpoint
from ar_kernels import KernelError
from ar_kernels.hf.fused import joined_experts
from ar_kernels.hf.plain import plain_opening
from ar_kernels.hf.understand import understand

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from ar_export.formats.base import Readable


def open_model(path: Path, dtype: torch.dtype | str = "auto") -> nn.Module:
    """Return the model of a checkpoint, on the CPU, ready to run.

    Checkpoints that ar-kernels can run are loaded by Transformers with its quantized layers.
    Others (a GGUF file) get their weights dequantized; activations then stay as they are.

    Raises:
        ExportError: no checkpoint, or one that no installed format reads.
    """
    from transformers import AutoConfig

    import ar_kernels  # noqa: F401 - teaches Transformers the formats

    found = open_checkpoint(path)
    if found.format != "float" and not has_kernels(found):
        return open_dequantized(found, dtype)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    model: nn.Module = architecture(config).from_pretrained(
        path, dtype=dtype, local_files_only=True
    )
    return model.eval()


def has_kernels(found: Readable) -> bool:
    """Tell whether ar-kernels runs a checkpoint as it is."""
    if found.quantization_config is None:
        return False
    try:
        understand(found.quantization_config)
    except KernelError:
        return False
    return True


def open_dequantized(found: Readable, dtype: torch.dtype | str = "auto") -> nn.Module:
    """Return the float model whose weights are those that a checkpoint's codes stand for.

    Raises:
        ExportError: tensors are missing that the architecture needs.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(found.path, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    wanted = _dtype(dtype, config)
    model, report = plain_opening(architecture(config), config)(
        None,
        config=config,
        state_dict=_oriented(dequantized(found, wanted), found, config),
        dtype=wanted,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        msg = (
            f"{found.path} lacks {len(missing)} tensors that its architecture needs: {missing[:4]}"
        )
        raise ExportError(msg)
    opened: nn.Module = model
    return opened.eval()


def dequantized(found: Readable, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint under its float name, quantized ones dequantized."""
    out = {f"{layer}.weight": found.weight(layer).dequantize(dtype) for layer in found.quantized}
    for name in found.names:
        layer, _, suffix = name.rpartition(".")
        if (layer in found.quantized and suffix != "bias") or layer == "":
            continue
        tensor = found.tensor(name)
        out[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return out


def _oriented(tensors: dict[str, Tensor], found: Readable, config: Any) -> dict[str, Tensor]:
    """Turn quantized weights of Conv1D layers, which the model keeps as [I, O], and join experts.

    Experts are joined where the names of single ones are those of `fused_parts`: Transformers
    does not know them in models whose own files are fused.
    """
    with torch.device("meta"):
        model = architecture(config)(config)
    turned = {name for name, part in model.named_modules() if type(part).__name__ == "Conv1D"}
    for layer in found.quantized:
        if layer in turned:
            tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].t().contiguous()
    return joined_experts(tensors, model)


def architecture(config: Any) -> Any:
    """Return the model class: the one the config names, else that of its type."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    sees = getattr(config, "vision_config", None) is not None
    kinds = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)
    for kind in kinds if sees else reversed(kinds):
        if type(config) in kind._model_mapping:  # noqa: SLF001
            return kind._model_mapping[type(config)]  # noqa: SLF001
    msg = f"no model class of Transformers is known for model type {config.model_type!r}"
    raise ExportError(msg)


def _dtype(asked: torch.dtype | str, config: Any) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    named = getattr(config, "dtype", None) if asked == "auto" else getattr(torch, asked, None)
    return named if isinstance(named, torch.dtype) else torch.float32
