"""llama.cpp's next-token distributions beside those of Transformers; run where both are.

    python tests/interop/llama_scores.py JOB

JOB is JSON: the float model (`reference`, whose tokenizer counts), a `text`, and `pairs` of
[name, directory of the same weights as floats, GGUF file]. Prints JSON on the last line.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_cpp import Llama
from transformers import AutoModelForCausalLM, AutoTokenizer


def ours(directory: str, rows: list[list[int]]) -> list[torch.Tensor]:
    """Return the log-probabilities of each row's next tokens, as Transformers computes them."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [torch.log_softmax(model(torch.tensor([r])).logits[0].float(), -1) for r in rows]


def theirs(llama: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """Return the same as llama.cpp computes them."""
    out = []
    for row in rows:
        llama.reset()
        llama.eval(row)
        scores = np.array(llama.scores[: len(row)], dtype=np.float32)
        out.append(torch.log_softmax(torch.from_numpy(scores), -1))
    return out


def kl(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Return the mean KL divergence of the second from the first."""
    parts = [(a.exp() * (a - b)).sum(-1) for a, b in zip(first, second, strict=True)]
    return float(torch.cat(parts).mean())


def main() -> None:
    """Score every pair."""
    job = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(job["reference"])
    text = Path(job["text"]).read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    size = job["seqlen"]
    rows = [ids[i : i + size] for i in range(0, min(job["tokens"], len(ids) - size), size)]
    probe = text[:4000]
    wanted = tokenizer(probe, add_special_tokens=False).input_ids
    floats = ours(job["reference"], rows)
    out = []
    for name, directory, file in job["pairs"]:
        llama = Llama(file, n_ctx=size, n_batch=size, logits_all=True, verbose=False, n_threads=1)
        mine = floats if name == "float" else ours(directory, rows)
        found = theirs(llama, rows)
        same = [(a.argmax(-1) == b.argmax(-1)) for a, b in zip(mine, found, strict=True)]
        out.append(
            {
                "type": name,
                "kl": kl(mine, found),
                "top1": float(torch.cat(same).float().mean()),
                "tokenizer": llama.tokenize(probe.encode(), add_bos=False, special=False) == wanted,
                "lost": kl(floats, mine),
            }
        )
        llama.close()
    version = importlib.metadata.version("llama-cpp-python")
    print(json.dumps({"version": version, "tokens": size * len(rows), "rows": out}))


if __name__ == "__main__":
    main()
