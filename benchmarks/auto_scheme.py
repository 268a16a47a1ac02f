"""Mixed precision beside the reference implementation: choice and tuning, one model, one machine.

    python benchmarks/auto_scheme.py MODEL --calibration FILE --text FILE --out DIR \
        --peer-python /path/to/venv/bin/python [--bits 3.0 2.5] [--iters 200]

Both choose among the same options for the same average of stored bits (codes, scales and zero
points as packed: the reference's own count), score layers on the same file with their own
defaults, tune on the same rows, and write `auto_round`. Each run is a process of its own. Scores
are those of `accuracy.py`; "scoring" is the time and the high-water mark of memory until
the choice stands, "seconds" and "peak" those of the whole. Runs that are finished in DIR are not
made again, so an interrupted benchmark goes on.

`--plans` prints what each side chose, layer by layer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from accuracy import score

OURS = """
import json, re, sys, time
from ar_tuner import AutoRound, AutoScheme
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
a = json.loads(sys.argv[1])
seen = {}
def listen(event):
    if event.kind == "scheme_chosen":
        seen.update(scoring=event.seconds, scoring_peak=peak())
began = time.perf_counter()
shared = {} if a["fused"] else {"shared_layers": []}
scheme = AutoScheme(avg_bits=a["bits"], options=a["options"], **shared)
job = AutoRound(a["model"], scheme=scheme, dataset=a["calibration"], nsamples=a["nsamples"],
                seqlen=a["seqlen"], batch_size=8, iters=a["iters"], overwrite=True,
                on_event=listen)
job.quantize_and_save(a["out"], format="auto_round")
seen.update(seconds=time.perf_counter() - began, peak=peak(),
            plan={k: v for k, v in job.chooser.choices[0].picks.items()})
print(json.dumps(seen))
"""

THEIRS = """
import json, re, sys, time
from auto_round import AutoRound, AutoScheme
from auto_round.auto_scheme.gen_auto_scheme import GenScheme
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
a = json.loads(sys.argv[1])
seen = {}
inner = GenScheme.get_layer_config
def timed(self):
    began = time.perf_counter()
    found = inner(self)
    seen.update(scoring=time.perf_counter() - began, scoring_peak=peak())
    return found
GenScheme.get_layer_config = timed
began = time.perf_counter()
shared = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] if a["fused"] else None
scheme = AutoScheme(avg_bits=a["bits"], options=a["options"], shared_layers=shared)
job = AutoRound(a["model"], scheme=scheme, dataset=a["calibration"], nsamples=a["nsamples"],
                seqlen=a["seqlen"], batch_size=8, iters=a["iters"])
job.quantize_and_save(a["out"], format="auto_round")
plan = {k: f"W{v['bits']}A16" for k, v in job.layer_config.items() if int(v["bits"]) < 16}
seen.update(seconds=time.perf_counter() - began, peak=peak(), plan=plan)
print(json.dumps(seen))
"""


def main() -> None:
    """Run what is missing, score and print one Markdown table."""
    args = _arguments()
    sides = [("ar", sys.executable, OURS)]
    if args.peer_python:
        sides.append(("auto-round", args.peer_python, THEIRS))
    print(
        "| average bits | tool | KL | perplexity | top-1 | weight bytes | scoring s | "
        "scoring MiB | seconds | peak MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for bits in args.bits:
        for name, python, program in sides:
            if args.only in (None, name):
                print(_row(args, bits, name, _run(args, bits, name, python, program)), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--only", help="ar or auto-round: run that side alone")
    parser.add_argument("--bits", nargs="+", type=float, default=[3.0, 2.5])
    parser.add_argument("--options", default="W2A16,W4A16,W8A16")
    parser.add_argument(
        "--fused", action="store_true", help="q, k, v and gate, up share, as engines need"
    )
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--plans", action="store_true")
    return parser.parse_args()


def _run(
    args: argparse.Namespace, bits: float, name: str, python: str, program: str
) -> dict[str, Any]:
    folder = args.out / f"{name}-{bits}-{args.iters}{'-fused' if args.fused else ''}"
    done = folder.with_name(f"{folder.name}.json")
    if done.is_file():
        return dict(json.loads(done.read_text(encoding="utf-8")), folder=folder)
    request = {key: getattr(args, key) for key in ("model", "calibration", "options", "fused")}
    request |= {key: getattr(args, key) for key in ("iters", "nsamples", "seqlen")}
    request |= {"bits": bits, "out": str(folder)}
    args.out.mkdir(parents=True, exist_ok=True)
    # scores that an earlier run left in a cache would be no measurement
    fresh = {"XDG_CACHE_HOME": str(folder.with_name(f"{folder.name}.cache"))}
    fresh |= {"AR_AUTO_SCHEME_CACHE": str(folder.with_name(f"{folder.name}.cache"))}
    ran = subprocess.run(
        [python, "-c", program, json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **fresh},
    )
    if ran.returncode:
        sys.exit(f"{python} failed at {bits} bits:\n{ran.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    done.write_text(json.dumps(result), encoding="utf-8")
    return dict(result, folder=folder)


def _row(args: argparse.Namespace, bits: float, name: str, found: dict[str, Any]) -> str:
    scores = score(args, found["folder"])
    if args.plans:
        for layer, scheme in sorted(found["plan"].items()):
            print(f"{bits} {name} {layer} {scheme}", file=sys.stderr)
    return (
        f"| {bits} | {name} | {scores['kl']:.5f} | {scores['ppl']:.3f} | {scores['top1']:.4f} "
        f"| {scores['bytes']} | {found['scoring']:.1f} | {found['scoring_peak']} "
        f"| {found['seconds']:.1f} | {found['peak']} |"
    )


if __name__ == "__main__":
    main()
