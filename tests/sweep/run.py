"""Check every type of language model that Transformers has, one process each.

    python tests/sweep/run.py                 # those of which there is no record yet
    python tests/sweep/run.py --again         # those that failed, too
    python tests/sweep/run.py llama gemma3    # these, again

    python tests/sweep/run.py --write         # only the tables, from the records that there are

Records go to `out/sweep.jsonl`, one line each; a sweep that was cut short goes on where it was. At
the end they are held against `expected.toml`. `--write` makes the tables of them: docs/models.md
and what `ar models` lists.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from table import write_tables

if TYPE_CHECKING:
    from multiprocessing.context import ForkContext, ForkProcess
    from multiprocessing.queues import Queue

ROOT = Path(__file__).parents[2]
EXPECTED = Path(__file__).with_name("expected.toml")
PATIENCE = 1800.0
"""Seconds after which a type is given up: hundreds of times what it takes on an idle machine."""


def main() -> int:
    """Run the sweep; return 1 if it found what nobody expected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="also those that failed before")
    parser.add_argument("--write", action="store_true", help="write the tables, check nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "sweep.jsonl")
    asked = parser.parse_args()
    quiet()
    from ar_tuner.testing import image_text_types, text_types
    from ar_tuner.testing.known import read_known, surprise

    every = sorted(text_types() | image_text_types())
    known = read(asked.out)
    done = {t for t, r in known.items() if r["failed"] is None or not asked.again}
    types = asked.types or sorted((t for t in every if t not in done), key=lambda t: t in known)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    if asked.write:
        types = []
    if types:
        warm_up()
    sweep(types, jobs=asked.jobs, out=asked.out)
    known = read(asked.out)
    failures = read_known(EXPECTED)
    if not asked.types:
        write(asked.out, {t: known[t] for t in every if t in known})
    passed = sum(1 for r in known.values() if r["failed"] is None)
    print(f"{passed} of {len(every)} types pass every step")
    if asked.write:
        write_tables(ROOT, known, failures)
    found = (surprise(record, failures) for record in known.values())
    wrong = [text for text in found if text is not None]
    print("\n".join(wrong))
    return 1 if wrong else 0


def sweep(types: list[str], *, jobs: int, out: Path) -> None:
    """Check types, `jobs` at a time, and add a record of each to a file as it is ready."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(types), {}
    answers: Queue[dict[str, Any]] = context.Queue()
    finished = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            kind = waiting.pop(0)
            running[kind] = (start(context, kind, answers), time.monotonic())
        record = _next(answers, running)
        if record is None:
            time.sleep(0.05)
            continue
        process, _ = running.pop(record["model_type"])
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
        finished += 1
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        verdict = record["failed"] or "ok"
        print(
            f"{finished}/{len(types)} {record['model_type']:28} {record['seconds']:6.1f} s "
            f"{verdict:10} {record['error'][:150]}",
            flush=True,
        )


def start(context: ForkContext, kind: str, answers: Queue[dict[str, Any]]) -> ForkProcess:
    """Return a process that checks a type and puts the record into the queue."""
    process = context.Process(target=_check, args=(kind, answers), daemon=True)
    process.start()
    return process


def quiet() -> None:
    """Import what all checks need, and keep libraries from chattering."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def warm_up() -> None:
    """Check one type here, so that no process has to import and look for plugins: most of its time.

    Nothing of it is kept, and no thread of it goes on.
    """
    from ar_tuner.testing.family import check_family

    check_family("llama")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of every type in a file."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {record["model_type"]: record for record in map(json.loads, lines)}


def write(path: Path, records: dict[str, dict[str, Any]]) -> None:
    """Write records, one line each, in the order of their types."""
    lines = [json.dumps(records[kind]) for kind in sorted(records)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _check(kind: str, answers: Queue[dict[str, Any]]) -> None:
    from ar_tuner.testing.family import check_family

    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the life of the process
    answers.put(check_family(kind).to_dict())


def _next(
    answers: Queue[dict[str, Any]], running: dict[str, tuple[ForkProcess, float]]
) -> dict[str, Any] | None:
    if not answers.empty():
        return answers.get()
    for kind, (process, began) in running.items():
        seconds = time.monotonic() - began
        if seconds > PATIENCE or (not process.is_alive() and answers.empty()):
            how = "took too long" if process.is_alive() else f"died ({process.exitcode})"
            process.kill()
            return {
                "model_type": kind,
                "class_name": "",
                "kind": "",
                "failed": "process",
                "error": how,
                "place": "",
                "facts": {},
                "seconds": round(seconds, 1),
            }
    return None


if __name__ == "__main__":
    sys.exit(main())
