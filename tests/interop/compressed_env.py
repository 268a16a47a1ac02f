"""A checkpoint of the compressed-tensors library itself, rounded to nearest, and its logits.

python tests/interop/compressed_env.py MODEL OUT OPTIONS LOGITS

OPTIONS is JSON: `groups` are config groups of compressed-tensors, which finds the format of each,
`dtype` the type of the model. Ranges of static activations are those of a few tokens. It is the
library that llm-compressor writes with: scales and bits are its own. Logits are those of its own
fake quantization before it packs: transformers 5.23 cannot open packed asymmetric files of
compressed-tensors 0.20 (shapes of the zero points differ).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM

IDS = torch.arange(48).reshape(2, 24)


def make(model: str, out: str, options: str, logits: str) -> None:
    """Quantize with compressed-tensors, write logits and checkpoint."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )

    asked = json.loads(options)
    dtype = asked.get("dtype", "bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    ranges = _ranges(loaded)
    config = QuantizationConfig(
        config_groups=asked["groups"],
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.INITIALIZED,
    )
    apply_quantization_config(loaded, config)
    for name, module in loaded.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            _fill(module, scheme, ranges[name])
    for module in loaded.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_status = QuantizationStatus.FROZEN
    with torch.no_grad():
        found = loaded(IDS).logits
    torch.save({"logits": found.float(), "dtype": f"torch.{dtype}"}, logits)
    compressor = ModelCompressor.from_pretrained_model(loaded)
    compressor.compress_model(loaded)
    loaded.save_pretrained(out)
    compressor.update_config(out)


def _ranges(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the least and largest input of every linear layer over some tokens."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: found.update({name: tuple(given[0].aminmax())})
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return found


def _fill(module: Any, scheme: Any, ends: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Set scales and zero points of a layer as the library computes them."""
    from compressed_tensors.quantization.utils import calculate_qparams

    args = scheme.weights
    weight = module.weight.data
    if args.strategy == "group":
        low, high = weight.unflatten(-1, (-1, args.group_size)).aminmax(dim=-1)
    elif args.strategy == "channel":
        low, high = weight.aminmax(dim=-1, keepdim=True)
    else:
        low, high = (end.reshape(1) for end in weight.aminmax())
    _set(module, "weight", calculate_qparams(low, high, args))
    inputs = scheme.input_activations
    if inputs is not None and not inputs.dynamic:
        low, high = (end.reshape(1) for end in ends)
        _set(module, "input", calculate_qparams(low, high, inputs))


def _set(module: Any, kind: str, found: tuple[torch.Tensor, torch.Tensor]) -> None:
    for name, value in zip((f"{kind}_scale", f"{kind}_zero_point"), found, strict=True):
        held = getattr(module, name, None)
        if held is not None:
            held.data.copy_(value.reshape(held.shape))


if __name__ == "__main__":
    make(*sys.argv[1:])
