"""Runs in the environment of another project: make its checkpoint, or give its logits for one.

python tests/interop/foreign_env.py make-gptqmodel MODEL OUT OPTIONS
python tests/interop/foreign_env.py logits-auto-round DIR OUT
python tests/interop/foreign_env.py logits-gptqmodel DIR OUT

OPTIONS is JSON for its QuantizeConfig. Logits are those of token ids 0 to 47 in two rows.
"""

from __future__ import annotations

import json
import os
import sys

# GPTQModel 7.7.0 asks for two workers and gives itself one on machines with two cores
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch

IDS = torch.arange(48).reshape(2, 24)


def make_gptqmodel(model: str, out: str, options: str) -> None:
    """Quantize with GPTQModel and write."""
    from gptqmodel import GPTQModel, QuantizeConfig

    job = GPTQModel.load(model, QuantizeConfig(**json.loads(options)), device="cpu")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 200, (48,), generator=generator).tolist() for _ in range(12)]
    job.quantize([{"input_ids": r, "attention_mask": [1] * len(r)} for r in rows], batch_size=1)
    job.save(out)


def logits_auto_round(path: str, out: str) -> None:
    """Write the logits of auto-round's own layers."""
    import auto_round  # noqa: F401 - teaches transformers its formats
    from transformers import AutoModelForCausalLM

    _write(AutoModelForCausalLM.from_pretrained(path, device_map="cpu"), out)


def logits_gptqmodel(path: str, out: str) -> None:
    """Write the logits of GPTQModel's own layers."""
    from gptqmodel import BACKEND, GPTQModel

    with open(f"{path}/config.json") as file:  # noqa: PTH123 - plain enough for any environment
        method = json.load(file)["quantization_config"]["quant_method"]
    kernel = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
    _write(GPTQModel.load(path, backend=kernel, device="cpu").model, out)


def _write(model: torch.nn.Module, out: str) -> None:
    with torch.no_grad():
        logits = model.eval()(IDS).logits
    torch.save({"logits": logits.float(), "dtype": str(next(model.parameters()).dtype)}, out)


if __name__ == "__main__":
    jobs = {
        "make-gptqmodel": make_gptqmodel,
        "logits-auto-round": logits_auto_round,
        "logits-gptqmodel": logits_gptqmodel,
    }
    jobs[sys.argv[1]](*sys.argv[2:])
