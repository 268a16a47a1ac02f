"""Every scheme in every format, opened by every reader at hand; writes docs/interop.md.

    python tests/interop/run.py --work DIR [--model DIR] [--full] [--only WORDS]
        [--auto-round PYTHON] [--gptqmodel PYTHON] [--mlx PYTHON] [--vllm PYTHON] [--llama PYTHON]
        [--score DIR] [--text FILE]

PYTHON is the interpreter of an environment with that reader: auto-round (with gptqmodel, which it
needs for AWQ), gptqmodel, mlx and mlx-lm, the Python files of vLLM, llama-cpp-python. A reader
that is not given is reported as not run. With `--llama` every GGUF type of the model, and of
further ones (`--score`), is compared with llama.cpp over a text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import readers
from cases import Case, cases, make
from gguf_scores import score
from page import page

import ar_cli

if TYPE_CHECKING:
    from collections.abc import Mapping

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEMO = Path(ar_cli.__file__).parent / "demo"
READS = {
    "auto_round": ("auto_round",),
    "gptqmodel": ("auto_gptq", "auto_awq"),
    "compressed_tensors": ("llm_compressor",),
    "transformers": ("fp8", "gguf", "fake"),
    "mlx": ("mlx",),
    "gguf": ("gguf",),
    "llama.cpp": ("gguf",),
    "vllm": ("auto_round", "auto_gptq", "auto_awq", "llm_compressor", "fp8"),
}
"""Formats of each reader."""


def main() -> int:
    """Quantize, read, compare, write the page."""
    args = parsed()
    wanted = [c for c in cases(full=args.full) if args.only in f"{c.title} {c.form}"]
    paths = {case: make(case, args.model, args.work) for case in wanted}
    results = {case.label: {"scheme": case.title, "format": case.form} for case in wanted}
    for reader, forms in READS.items():
        mine = {c: p for c, p in paths.items() if c.form.partition(":")[0] in forms}
        for label, outcome in ask(reader, mine, args).items():
            results[label][reader] = outcome
    keep(args.work / "interop.json", results)
    if args.llama:
        for model in (args.model, *args.score):
            score(model, args.text, args.llama, args.work / "scores")
    text, bad = page(args.work, environments(args))
    (ROOT / "docs" / "interop.md").write_text(text, encoding="utf-8")
    print("\n".join(bad))
    return 1 if bad else 0


def keep(path: Path, results: dict[str, dict[str, str]]) -> None:
    """Store outcomes beside those of earlier runs, in the order of the cases."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    known |= results
    ordered = {c.label: known[c.label] for c in cases(full=True) if c.label in known}
    path.write_text(json.dumps(ordered, indent=1))


def parsed() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--full", action="store_true", help="every group size")
    parser.add_argument("--only", default="", help="rows with these words")
    for name in ("auto-round", "gptqmodel", "mlx", "vllm", "llama"):
        parser.add_argument(f"--{name}", dest=name.replace("-", "_"), metavar="PYTHON")
    parser.add_argument("--score", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--text", type=Path, default=DEMO / "eval.txt")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def environments(args: argparse.Namespace) -> dict[str, str | None]:
    """Return interpreters by the package whose version the page tells."""
    return {"auto-round": args.auto_round, "gptqmodel": args.gptqmodel, "mlx": args.mlx}


def ask(reader: str, mine: Mapping[Case, Path], args: argparse.Namespace) -> dict[str, str]:
    """Return what a reader makes of its checkpoints, by label."""
    paths = {case.label: path for case, path in mine.items()}
    if reader in ("gguf", "llama.cpp"):
        one = readers.decoded if reader == "gguf" else readers.served
        return {label: one(path) for label, path in paths.items()}
    python = sys.executable
    if reader in ("auto_round", "gptqmodel", "mlx", "vllm"):
        python = getattr(args, reader)
    if python is None or not paths:
        return dict.fromkeys(paths, "not run")
    if reader == "vllm":
        return readers.vllm(python, HERE / "vllm_configs.py", paths, args.work)
    out = readers.probed(reader, python, HERE / "probe.py", paths, args.work)
    if reader == "auto_round":
        for case in mine:
            if out[case.label].startswith("fails"):
                out[case.label] = own(case, out[case.label], args)
    return out


def own(case: Case, outcome: str, args: argparse.Namespace) -> str:
    """Return the outcome beside that of auto-round's reader on auto-round's own checkpoint."""
    out = args.work / "own" / case.label
    options = json.dumps(case.options)
    command = [args.auto_round, str(HERE / "peer.py"), str(args.model), str(out)]
    command += [case.scheme, case.form, options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=readers.quiet())
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1][:160]
        return f"{outcome}; auto-round itself does not write this: {last}"
    path = Path(done.stdout.strip().splitlines()[-1])
    theirs = readers.probed("auto_round", args.auto_round, HERE / "probe.py", {"": path}, out)[""]
    if theirs.startswith("fails"):
        return f"reader fails on its own checkpoint too: {theirs.removeprefix('fails: ')}"
    return f"{outcome}; its own opens"


if __name__ == "__main__":
    sys.exit(main())
