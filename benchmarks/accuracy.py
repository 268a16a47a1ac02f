"""Accuracy, wall time and memory beside the reference implementation, on one model and one machine.

    python benchmarks/accuracy.py MODEL --calibration FILE --text FILE --out DIR \
        [--peer-python PEER/bin/python] [--rows W4A16 W3A16 ...] [--seeds 42 43 44] [--page FILE]

The environment of `--peer-python` holds auto-round (`pip install torch==2.13.0`, then
`pip install auto-round==0.16.1`). Each quantization runs in a process of its own, ours and theirs
in turn, so that a busy machine is busy for both. Seconds are those of `quantize_and_save`; loading
the model is part of ours only. Peak memory is the high-water mark of the process (VmHWM; ru_maxrss
would start at the parent's). Checkpoints of both are opened by transformers with ar-kernels and
scored against the float model on held-out text.

What was run is kept in OUT/results.jsonl and not run again, so a run can be interrupted. `--page`
writes the table between the markers of a document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = """
import json, re, sys, time
from ar_tuner import AutoRound
a = json.loads(sys.argv[1])
began = time.perf_counter()
job = AutoRound(a["model"], dataset=a["calibration"], seqlen=a["seqlen"], seed=a["seed"],
                overwrite=True, **a["options"])
job.quantize_and_save(a["out"], format=a["format"])
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(json.dumps({"seconds": time.perf_counter() - began, "peak": int(peak[1]) // 1024}))
"""

THEIRS = """
import json, re, sys, time
from auto_round import AutoRound
a = json.loads(sys.argv[1])
job = AutoRound(a["model"], dataset=a["calibration"], seqlen=a["seqlen"], seed=a["seed"],
                **a["options"])
began = time.perf_counter()
job.quantize_and_save(a["out"], format=a["format"])
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(json.dumps({"seconds": time.perf_counter() - began, "peak": int(peak[1]) // 1024}))
"""
BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"


@dataclass(frozen=True)
class Row:
    """One line of the table: a scheme, and what each tool is asked for beyond its defaults."""

    scheme: str
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] | None = field(default_factory=dict)
    format: str = "auto_round"


_RTN = {"iters": 0, "disable_opt_rtn": True}
_OPT = {"iters": 0, "disable_opt_rtn": False}
_EXT = {"enable_alg_ext": True}
_INTEGERS = ("W4A16", "W3A16", "W2A16", "W2A16G64")
ROWS: dict[str, Row] = {
    **{name: Row(name) for name in (*_INTEGERS, "MXFP4", "NVFP4")},
    **{f"{name} alg_ext": Row(name, {}, _EXT) for name in (*_INTEGERS, "MXFP4", "NVFP4")},
    **{f"{n} opt_rtn": Row(n, {"recipe": "opt_rtn"}, _OPT) for n in (*_INTEGERS, "MXFP4", "NVFP4")},
    **{f"{n} rtn": Row(n, {"recipe": "rtn"}, _RTN) for n in _INTEGERS},
    **{f"{n} fast": Row(n, {"recipe": "fast"}, None) for n in _INTEGERS},
    **{f"{n} signround": Row(n, {"algorithm": "signround"}, None) for n in _INTEGERS},
    **{f"{n} no distill": Row(n, {"distill": False}, None) for n in _INTEGERS},
}
DEFAULT = (*_INTEGERS, "MXFP4", "NVFP4")


def main() -> None:
    """Run what is missing, score it, print the table."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "results.jsonl"
    for seed in args.seeds:
        for name in args.rows:
            for tool, python, program in _sides(args):
                options = ROWS[name].ours if tool == "ar" else ROWS[name].theirs
                if options is None or _known(kept, args, name, tool, seed):
                    continue
                result = _measure(args, name, tool, python, program, options, seed)
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
    table = _table([r for r in _read(kept) if r["model"] == args.model and r["row"] in args.rows])
    print(table)
    if args.page is not None:
        text = args.page.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        tail = rest.partition(END)[2]
        args.page.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--rows", nargs="+", default=list(DEFAULT), choices=ROWS, metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--tools", nargs="+", default=["ar", "auto-round"], help="run these only")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--page", type=Path)
    return parser.parse_args()


def _sides(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    sides = [("ar", sys.executable, OURS)]
    if args.peer_python is not None:
        sides.append(("auto-round", args.peer_python, THEIRS))
    return [side for side in sides if side[0] in args.tools]


def _read(kept: Path) -> list[dict[str, Any]]:
    if not kept.is_file():
        return []
    return [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]


def _known(kept: Path, args: argparse.Namespace, row: str, tool: str, seed: int) -> bool:
    mine = {"model": args.model, "row": row, "tool": tool, "seed": seed}
    return any(mine.items() <= f.items() and "failed" not in f for f in _read(kept))


def _measure(  # noqa: PLR0913
    args: argparse.Namespace,
    name: str,
    tool: str,
    python: str,
    program: str,
    options: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    row, model = ROWS[name], Path(args.model).name
    out = args.out / f"{model}-{tool}-{name}-{seed}".replace(" ", "_")
    tuned = "iters" not in options and options.get("recipe") is None
    numbers = {"nsamples": args.nsamples, "batch_size": 8, "scheme": row.scheme}
    request = {
        "model": str(Path(args.model).resolve()),
        "calibration": str(Path(args.calibration).resolve()),
        "seqlen": args.seqlen,
        "seed": seed,
        "out": str(out.resolve()),
        "format": row.format,
        "options": {**({"iters": args.iters} if tuned else {}), **numbers, **options},
    }
    # away from this folder, whose kernels.py Transformers would take for the package of that name
    done = subprocess.run(
        [python, "-c", program, json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        cwd=args.out,
    )
    found = {"model": args.model, "row": name, "tool": tool, "seed": seed}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return found | {"failed": lines[-1][:160] if lines else f"exit code {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found | result | score(args, out)


def score(args: argparse.Namespace, out: Path) -> dict[str, float]:
    """Return KL, perplexity, top-1 agreement and weight bytes of a checkpoint.

    `args` names the float model, the text and the length of a window.
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


def _table(results: list[dict[str, Any]]) -> str:
    """Return one Markdown line per row and tool, medians over seeds, and the ratio of KL."""
    lines = [
        "| row | tool | KL (spread) | ratio | perplexity | top-1 | weight bytes | seconds "
        "| ratio | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for found in results:
        cells[found["row"], found["tool"]].append(found)
    for (row, tool), runs in sorted(cells.items(), key=lambda item: list(ROWS).index(item[0][0])):
        failed = [r["failed"] for r in runs if "failed" in r]
        runs = [r for r in runs if "failed" not in r]
        if not runs:
            lines.append(f"| {row} | {tool} | fails: {failed[-1].replace('|', '/')} |||||||||")
            continue
        other = [r for r in cells.get((row, "auto-round"), []) if "failed" not in r]
        lines.append(_line(row, tool, runs, other if tool == "ar" else []))
    return "\n".join(lines)


def _line(row: str, tool: str, runs: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    def middle(name: str, of: list[dict[str, Any]] = runs) -> float:
        return statistics.median(r[name] for r in of)

    kls = [r["kl"] for r in runs]
    spread = f" ({min(kls):.5f}-{max(kls):.5f})" if len(kls) > 1 else ""
    ratios = ["", ""]
    if other:
        ratios = [f"{middle(n) / middle(n, other):.2f}" for n in ("kl", "seconds")]
    return (
        f"| {row} | {tool} | {middle('kl'):.5f}{spread} | {ratios[0]} | {middle('ppl'):.3f} "
        f"| {middle('top1'):.4f} | {middle('bytes'):.0f} | {middle('seconds'):.1f} | {ratios[1]} "
        f"| {middle('peak'):.0f} |"
    )


if __name__ == "__main__":
    main()
