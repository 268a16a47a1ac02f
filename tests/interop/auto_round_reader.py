"""The same checkpoint through the auto-round package and through ar-kernels: equal logits and text.

Each side runs in an environment of its own:

    peer/bin/python tests/interop/auto_round_reader.py read DIR --import auto_round --out theirs.pt
    .venv/bin/python tests/interop/auto_round_reader.py read DIR --import ar_kernels --out ours.pt
    .venv/bin/python tests/interop/auto_round_reader.py compare theirs.pt ours.pt

`peer` holds `torch==2.13.0` and `auto-round==0.16.1`. Outcomes are in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

PROMPTS = ("Once upon a time", "The little dog", "Lily and Tom went to the", "One day, a big")
TOLERANCE = 5e-3
"""Largest difference of logits, relative to their largest; auto-round computes in float16."""


def read(directory: Path, module: str, out: Path) -> None:
    """Open a checkpoint with a reader and store logits and greedy text."""
    importlib.import_module(module)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    kinds = sorted({type(m).__module__.split(".")[0] for m in model.modules()})
    results = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        results[prompt] = {"logits": logits.float(), "ids": ids, "text": tokenizer.decode(ids[0])}
    torch.save({"reader": module, "modules": kinds, "results": results}, out)
    print(f"{module}: {directory}, module classes from {', '.join(kinds)}")


def compare(first: Path, second: Path) -> int:
    """Compare two stored readings; return 0 when they agree."""
    one, two = (torch.load(p, weights_only=True) for p in (first, second))
    worst, same = 0.0, True
    for prompt in PROMPTS:
        a, b = one["results"][prompt], two["results"][prompt]
        difference = (a["logits"] - b["logits"]).abs().max() / a["logits"].abs().max()
        worst = max(worst, float(difference))
        same = same and torch.equal(a["ids"], b["ids"])
    print(
        f"{one['reader']} and {two['reader']}: logits differ by {worst:.2e} of their range, "
        f"greedy text {'equal' if same else 'DIFFERENT'} over {len(PROMPTS)} prompts of 40 tokens"
    )
    return 0 if same and worst <= TOLERANCE else 1


def main() -> int:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    reading = steps.add_parser("read")
    reading.add_argument("directory", type=Path)
    reading.add_argument("--import", dest="module", required=True)
    reading.add_argument("--out", type=Path, required=True)
    comparing = steps.add_parser("compare")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    args = parser.parse_args()
    if args.step == "read":
        read(args.directory, args.module, args.out)
        return 0
    return compare(args.first, args.second)


if __name__ == "__main__":
    sys.exit(main())
