"""Weights as a reader's own layers compute with them: each layer applied to the identity.

    python tests/interop/probe.py READER OUT DIR...

READER is auto_round, gptqmodel, compressed_tensors, transformers or mlx, in an environment of its
own. OUT/layers.json names the quantized layers by directory. Writes OUT/<name of DIR>.pt with their
weights, or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def open_with(reader: str, directory: Path) -> Any:
    """Return the model of a checkpoint, opened by a reader."""
    if reader == "mlx":
        from mlx_lm.utils import load_model

        return load_model(directory)[0]
    if reader == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        method = json.loads((directory / "quantization_config.json").read_text())["quant_method"]
        kind = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
        return GPTQModel.load(str(directory), backend=kind, device="cpu").model
    import transformers

    options: dict[str, Any] = {"output_loading_info": True}
    if reader == "auto_round":
        import auto_round  # noqa: F401 - registers itself

        options["device_map"] = "cpu"
    elif reader == "compressed_tensors":
        config = json.loads((directory / "config.json").read_text())["quantization_config"]
        # it dequantizes zero points only while loading, several groups only when first run
        if len(config["config_groups"]) == 1:
            options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    elif reader == "transformers":
        files = [f.name for f in directory.glob("*.gguf")]
        config = json.loads((directory / "config.json").read_text())
        if files:  # its table of GGUF keys has no head_dim for every model
            known = transformers.AutoConfig.from_pretrained(directory)
            options |= {"gguf_file": files[0], "dtype": torch.float32, "config": known}
        elif "quantization_config" in config:
            options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    missing = sorted(report["missing_keys"])
    if missing:  # else it would go on with random numbers in their place
        msg = f"{len(missing)} tensors are not read: {missing[0]}, ..."
        raise LookupError(msg)
    if reader == "compressed_tensors":
        model(torch.arange(4)[None])  # it decompresses when the model first runs
    return model


def weights(model: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the weight [O, I] of linear layers by name."""
    if not isinstance(model, torch.nn.Module):
        return {name: mlx_weight_of(model, name) for name in names}
    model.eval()
    return {name: weight_of(model.get_submodule(name)) for name in names}


def mlx_weight_of(model: Any, name: str) -> torch.Tensor:
    """Return the weight [O, I] that a layer of MLX multiplies with."""
    import mlx.core as mx
    import numpy as np

    for part in name.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    columns = model.weight.shape[1]
    if hasattr(model, "bits"):
        columns = columns * 32 // model.bits
    return torch.from_numpy(np.array(model(mx.eye(columns)))).t().clone()


def weight_of(module: Any) -> torch.Tensor:
    """Return the weight [O, I] that a layer multiplies with."""
    if isinstance(module, torch.nn.Linear) and module.weight.dtype.itemsize > 1:
        return module.weight.detach().float()
    if hasattr(module, "dequant_weight_online"):  # quantizes its activations otherwise
        return module.dequant_weight_online().detach().float()
    columns = getattr(module, "in_features", None) or module.infeatures
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        try:
            with torch.inference_mode():
                eye = torch.eye(columns, dtype=dtype)[None]
                return module(eye)[0].t().float().clone()
        except RuntimeError:
            if dtype == torch.float32:
                raise
    raise AssertionError


def main() -> None:
    """Probe the directories one after the other; what fails does not stop the rest."""
    reader, folder = sys.argv[1], Path(sys.argv[2])
    layers = json.loads((folder / "layers.json").read_text())
    for name in sys.argv[3:]:
        directory = Path(name)
        try:
            model = open_with(reader, directory)
            found: Any = weights(model, layers[directory.name])
        except Exception as error:  # noqa: BLE001 - the outcome is the point
            found = f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
        torch.save(found, folder / f"{directory.name}.pt")


if __name__ == "__main__":
    main()
