"""A whole model at work: ours in 4 bits, Transformers in bf16, llama.cpp with the same weights.

    python benchmarks/model_speed.py --tokenizer DIR --out DIR [--llama-python LLAMA/bin/python]

The model has the shape of Qwen3-0.6B and random weights, so nothing is downloaded; DIR lends a
tokenizer, which a GGUF file needs (its vocabulary is padded). It is rounded to W4A16 in groups of
128 for ours and to Q4_0 for llama.cpp: the same number of bits for the same linear layers, read
with the same number of threads. llama.cpp's file holds the tied embedding, which is the output
head too, in 6 bits (Q6_K); ours holds it in bf16, and `--heads` adds rows that compute with a head
of fewer bits, made as the model is opened. Tokens are random; each row is the median of several
passes, the programs take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}
LLAMA = """
import json, sys, time
import numpy as np
from llama_cpp import Llama
job = json.loads(sys.argv[1])
began = time.perf_counter()
llama = Llama(job["file"], n_ctx=1024, n_batch=512, n_threads=job["threads"],
              n_threads_batch=job["threads"], verbose=False)
loaded = time.perf_counter() - began
rng = np.random.default_rng(0)
reads, steps = [], []
for passed in range(job["repeat"] + 1):
    llama.reset()
    ids = rng.integers(0, 4000, job["prompt"]).tolist()
    began = time.perf_counter()
    llama.eval(ids)
    read = time.perf_counter() - began
    for _ in range(job["new"]):
        began = time.perf_counter()
        llama.eval([7])
        if passed:
            steps.append(time.perf_counter() - began)
    if passed:
        reads.append(read)
status = open("/proc/self/status").read()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
step = sorted(steps)[len(steps) // 2]
print("ROW " + json.dumps({
    "prefill_tokens_per_second": job["prompt"] / sorted(reads)[len(reads) // 2],
    "decode_tokens_per_second": 1 / step, "load_seconds": loaded, "peak_bytes": peak}))
"""


def main() -> None:
    """Make the models, run everybody in turn, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--llama-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--heads", nargs="*", type=int, default=[8, 6], help="of the first scheme")
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "W2A16", "MXFP4"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = _model(args.out / "bf16", args.tokenizer)
    runs: dict[str, Any] = {"bf16, Transformers": lambda: _bench(model, args)}
    for name in args.schemes:
        path = _rounded(model, args.out / name, name, "auto_round")
        runs[f"{name}, ar-kernels"] = lambda path=path: _bench(path, args)
        for bits in args.heads if name == args.schemes[0] else ():
            label = f"{name}, head in {bits} bits, ar-kernels"
            runs[label] = lambda path=path, bits=bits: _bench(path, args, bits)
    if args.llama_python:
        file = next(_rounded(model, args.out / "q4_0", None, "gguf:q4_0").rglob("*.gguf"))
        runs["Q4_0, llama.cpp"] = lambda: _llama(file, args)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(args.turns):
        for name, run in runs.items():
            found[name].append(run())
    print(_table(found))


def _model(out: Path, tokenizer: Path) -> Path:
    """Return the directory of the float model, made if it is not there."""
    if not (out / "config.json").is_file():
        import torch
        from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        config = Qwen3Config(**SHAPE, tie_word_embeddings=True)
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)
    return out


def _rounded(model: Path, out: Path, scheme: str | None, file_format: str) -> Path:
    """Return the directory of a quantized model, made if it is not there."""
    if not out.is_dir():
        from ar_tuner import AutoRound

        options: dict[str, Any] = {} if scheme is None else {"scheme": scheme}
        AutoRound(model, recipe="rtn", **options).quantize_and_save(out, format=file_format)
    return out


def _bench(path: Path, args: argparse.Namespace, head_bits: int | None = None) -> dict[str, Any]:
    options = {"prompt-tokens": args.prompt, "new-tokens": args.new, "threads": args.threads}
    typed = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "ar_cli", "bench", str(path), "--json", *typed]
    asked = {} if head_bits is None else {"AR_KERNELS_HEAD_BITS": str(head_bits)}
    environment = {**os.environ, **asked}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _llama(file: Path, args: argparse.Namespace) -> dict[str, Any]:
    numbers = {"prompt": args.prompt, "new": args.new, "threads": args.threads, "repeat": 3}
    job = json.dumps({"file": str(file), **numbers})
    command = [args.llama_python, "-c", LLAMA, job]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = next(s for s in done.stdout.splitlines() if s.startswith("ROW "))
    found: dict[str, Any] = json.loads(row[4:])
    return found


def _table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| model | writing, tokens/s | ratio | prompt, tokens/s | ratio | loading, s | peak MiB "
        "| backends |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def middle(runs: list[dict[str, Any]], name: str) -> float:
        return statistics.median(r[name] for r in runs)

    first = next(iter(found.values()))
    for name, runs in found.items():
        cells = []
        for key in ("decode_tokens_per_second", "prefill_tokens_per_second"):
            mine = middle(runs, key)
            cells += [f"{mine:.1f}", f"{mine / middle(first, key):.2f}"]
        used = ", ".join(f"{k} {v}" for k, v in runs[0].get("backends", {}).items())
        lines.append(
            f"| {name} | {' | '.join(cells)} | {middle(runs, 'load_seconds'):.1f} "
            f"| {middle(runs, 'peak_bytes') / 2**20:.0f} | {used} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
