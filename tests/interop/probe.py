"""Weights as a reader's own layers compute with them: each layer applied to the identity.

    python tests/interop/probe.py READER OUT DIR...

READER is auto_round, gptqmodel or compressed_tensors, in an environment of its own. Writes
OUT/<name of DIR>.pt with the weights by layer, or the error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch


def open_with(reader: str, directory: Path) -> Any:
    """Return the model of a checkpoint, opened by a reader."""
    if reader == "gptqmodel":
        import json

        from gptqmodel import BACKEND, GPTQModel

        config = json.loads((directory / "quantization_config.json").read_text())
        kind = BACKEND.AWQ_TORCH if config["quant_method"] == "awq" else BACKEND.GPTQ_TORCH
        return GPTQModel.load(str(directory), backend=kind, device="cpu").model
    from transformers import AutoModelForCausalLM

    if reader == "auto_round":
        import auto_round  # noqa: F401 - registers itself

        return AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
    from transformers import CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    model(torch.arange(4)[None])  # some compressors are undone when the model first runs
    return model


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weight [O, I] of every linear layer in the blocks."""
    out = {}
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        columns = getattr(module, "in_features", None) or module.infeatures
        if isinstance(module, torch.nn.Linear) and module.weight.dtype.itemsize > 1:
            out[name] = module.weight.detach().float()
            continue
        if hasattr(module, "dequant_weight_online"):  # quantizes its activations otherwise
            out[name] = module.dequant_weight_online().detach().float()
            continue
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            try:
                with torch.inference_mode():
                    eye = torch.eye(columns, dtype=dtype)[None]
                    out[name] = module(eye)[0].t().float().clone()
                break
            except RuntimeError:
                if dtype == torch.float32:
                    raise
    return out


def main() -> None:
    """Probe the directories one after the other; what fails does not stop the rest."""
    reader, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[3:]:
        directory = Path(name)
        try:
            found: Any = weights(open_with(reader, directory).eval())
        except Exception as error:  # noqa: BLE001 - the outcome is the point
            found = f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
        torch.save(found, folder / f"{directory.name}.pt")


if __name__ == "__main__":
    main()
