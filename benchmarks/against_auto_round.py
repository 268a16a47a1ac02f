"""Accuracy, wall time and memory beside the reference implementation, on one model and one machine.

    python benchmarks/against_auto_round.py MODEL --calibration FILE --text FILE --out DIR \
        --peer-python /path/to/venv/bin/python [--schemes W4A16 W3A16 W2A16] [--iters 200]

The venv of `--peer-python` holds auto-round (`pip install torch==2.13.0`, then
`pip install auto-round==0.16.1`). Each quantization runs in a process of its own, ours and theirs
in turn, so that a busy machine is busy for both; seconds are those of `quantize_and_save` (models
are loaded before on their side, and loading is part of ours). Peak memory is the high-water mark
of the process (VmHWM; ru_maxrss would start at the parent's). Checkpoints of both are opened by
transformers with ar-kernels and scored against the float model on held-out text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

OURS = """
import json, re, sys, time
from ar_tuner import AutoRound
a = json.loads(sys.argv[1])
began = time.perf_counter()
job = AutoRound(a["model"], scheme=a["scheme"], dataset=a["calibration"], recipe=a["recipe"],
                nsamples=a["nsamples"], seqlen=a["seqlen"], batch_size=8, overwrite=True,
                **({"iters": a["iters"]} if a["recipe"] != "rtn" else {}))
job.quantize_and_save(a["out"], format="auto_round")
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(json.dumps({"seconds": time.perf_counter() - began,
                  "peak": int(peak[1]) // 1024}))
"""

THEIRS = """
import json, re, sys, time
from auto_round import AutoRound
a = json.loads(sys.argv[1])
rtn = {"iters": 0, "disable_opt_rtn": True} if a["recipe"] == "rtn" else {"iters": a["iters"]}
job = AutoRound(a["model"], scheme=a["scheme"], dataset=a["calibration"], nsamples=a["nsamples"],
                seqlen=a["seqlen"], batch_size=8, **rtn)
began = time.perf_counter()
job.quantize_and_save(a["out"], format="auto_round")
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(json.dumps({"seconds": time.perf_counter() - began,
                  "peak": int(peak[1]) // 1024}))
"""


def main() -> None:
    """Run, score and print one Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "W3A16", "W2A16"])
    parser.add_argument("--recipes", nargs="+", default=["default", "rtn"])
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument(
        "--repeat", type=int, default=1, help="timed runs of each; the median counts"
    )
    args = parser.parse_args()
    sides = [("ar", sys.executable, OURS)]
    if args.peer_python:
        sides.append(("auto-round", args.peer_python, THEIRS))
    print(
        "| scheme | recipe | tool | KL | perplexity | top-1 | weight bytes | seconds | peak MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for scheme in args.schemes:
        for recipe in args.recipes:
            timed: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in sides}
            for _ in range(args.repeat):
                for name, python, program in sides:
                    out = args.out / f"{name}-{scheme}-{recipe}"
                    timed[name].append(_run(python, program, args, scheme, recipe, out))
            for name, _, _ in sides:
                out = args.out / f"{name}-{scheme}-{recipe}"
                seconds = statistics.median(t["seconds"] for t in timed[name])
                peak = statistics.median(t["peak"] for t in timed[name])
                scores = score(args, out)
                print(
                    f"| {scheme} | {recipe} | {name} | {scores['kl']:.5f} | {scores['ppl']:.3f} "
                    f"| {scores['top1']:.4f} | {scores['bytes']} | {seconds:.1f} | {peak:.0f} |",
                    flush=True,
                )


def _run(
    python: str, program: str, args: argparse.Namespace, scheme: str, recipe: str, out: Path
) -> dict[str, Any]:
    request = {
        "model": args.model,
        "scheme": scheme,
        "recipe": recipe,
        "calibration": args.calibration,
        "iters": args.iters,
        "nsamples": args.nsamples,
        "seqlen": args.seqlen,
        "out": str(out),
    }
    done = subprocess.run(
        [python, "-c", program, json.dumps(request)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{python} failed on {scheme}, {recipe}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def score(args: argparse.Namespace, out: Path) -> dict[str, float]:
    """Return KL, perplexity, top-1 agreement and weight bytes of a checkpoint.

    `args` has the float model, the text and the length of a window.
    """
    candidate = next(out.rglob("config.json")).parent  # the reference adds a folder for some
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import ar_kernels  # noqa: F401 - teaches transformers the format
    from ar_tuner.evaluate import compare, windows

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.text.read_text(encoding="utf-8")
    ids = windows(tokenizer, text, seqlen=args.seqlen, tokens=40960)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (args.model, candidate)
    ]
    scores = compare(models[0], models[1], ids)
    size = sum(f.stat().st_size for f in candidate.rglob("*.safetensors"))
    return {"kl": scores.kl, "ppl": scores.ppl, "top1": scores.top1, "bytes": size}


if __name__ == "__main__":
    main()
