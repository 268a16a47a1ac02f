"""`ar bench`: how fast a checkpoint runs here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ar_cli.output import duration, json_option, print_json, print_table, size
from ar_cli.quiet import hush
from ar_schemes import ArError

if TYPE_CHECKING:
    from ar_cli.speed import Speed
    from ar_cli.speed_compiled import CompiledSpeed

_COUNT = click.IntRange(min=1)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--against", type=click.Path(path_type=Path), help="Another checkpoint, run after this one."
)
@click.option("--prompt-tokens", type=_COUNT, default=128, show_default=True)
@click.option("--new-tokens", type=_COUNT, default=32, show_default=True)
@click.option("--batch", type=_COUNT, default=1, show_default=True, help="Prompts at a time.")
@click.option("--repeat", type=_COUNT, default=3, show_default=True, help="Passes that count.")
@click.option("--threads", type=_COUNT, help="Of the CPU; default: as torch chooses.")
@click.option("--dtype", default="auto", show_default=True, help="Type to compute in.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--compile", "compiles", is_flag=True, help="Also under torch.compile, beside it.")
@click.option("--compile-backend", default="inductor", show_default=True, help="Of torch.compile.")
@json_option
def bench(  # noqa: PLR0913
    directory: Path,
    against: Path | None,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    repeat: int,
    threads: int | None,
    dtype: str,
    device: str,
    compiles: bool,  # noqa: FBT001
    compile_backend: str,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Measure how fast the model in DIRECTORY reads a prompt and writes, on random tokens.

    With --against the same is done with another checkpoint, in a process of its own; with --compile
    the same model is measured again under torch.compile, which takes a minute or more to prepare.
    """
    hush()
    import torch

    from ar_cli.opening import open_model
    from ar_cli.speed import Load, backends_of, measure
    from ar_cli.speed_compiled import measure_compiled, refuse_compiling
    from ar_tuner.progress import peak_bytes

    if against is not None and (compiles or not against.is_dir()):
        msg = f"--against {str(against)!r} is no directory"
        raise ArError("--against and --compile: use one of them at a time" if compiles else msg)
    if threads is not None:
        torch.set_num_threads(threads)
    if compiles:
        refuse_compiling(device, backend=compile_backend)
    began = time.perf_counter()
    model = open_model(directory, dtype, device=device)
    loaded = time.perf_counter() - began
    load = Load(prompt_tokens, new_tokens, batch, repeat)
    found: dict[str, Any] = {
        **_speeds(measure(model, load)),
        "load_seconds": loaded,
        "peak_bytes": peak_bytes(),
        "threads": torch.get_num_threads(),
        "backends": backends_of(model),
    }
    others: dict[str, dict[str, Any]] = {}
    if compiles:
        others["compiled"] = _facts(measure_compiled(model, load, backend=compile_backend))
    if against is not None:
        del model
        options = ["--prompt-tokens", prompt_tokens, "--new-tokens", new_tokens, "--batch", batch]
        options += ["--repeat", repeat, "--threads", torch.get_num_threads(), "--dtype", dtype]
        others["against"] = _elsewhere(against, [*options, "--device", device])
    if as_json:
        print_json({"this": found, **others} if others else found)
        return
    name = against.name or str(against) if against is not None else "compiled"
    _print(directory.name or str(directory), found, name, next(iter(others.values()), None))


def _speeds(speed: Speed) -> dict[str, float]:
    return {
        "prefill_tokens_per_second": speed.prefill,
        "decode_tokens_per_second": speed.decode,
        "milliseconds_per_token": speed.step * 1e3,
    }


def _facts(compiled: CompiledSpeed) -> dict[str, Any]:
    facts = {"compile_seconds": compiled.compile_seconds, "whole_graphs": compiled.whole}
    return {**_speeds(compiled.speed), **facts}


def _print(name: str, found: dict[str, Any], beside: str, other: dict[str, Any] | None) -> None:
    """Print a table of what was measured and, where there is one, of the other model beside it."""
    columns = ["measure", name]
    rows: list[list[object]] = [[_LABELS[k], _shown(k, v)] for k, v in found.items()]
    if other is not None:
        columns += [beside, "ratio"]
        for row, (key, value) in zip(rows, found.items(), strict=True):
            there = other.get(key)
            ratio = f"{value / there:.2f}" if key in _RATIOS and there else ""
            row += ["" if there is None else _shown(key, there), ratio]
        extra = [(k, v) for k, v in other.items() if k not in found]
        rows += [[_LABELS[k], "", _shown(k, v), ""] for k, v in extra]
    print_table(columns, rows)


_LABELS = {
    "prefill_tokens_per_second": "prompt, tokens per second",
    "decode_tokens_per_second": "writing, tokens per second",
    "milliseconds_per_token": "milliseconds per new token",
    "load_seconds": "time to load",
    "peak_bytes": "peak memory",
    "threads": "threads",
    "backends": "quantized layers by backend",
    "compile_seconds": "time to compile",
    "whole_graphs": "prompt and step are one graph each",
}
_RATIOS = (
    *("prefill_tokens_per_second", "decode_tokens_per_second", "milliseconds_per_token"),
    *("load_seconds", "peak_bytes"),
)


def _shown(key: str, value: Any) -> str:
    if key in ("load_seconds", "compile_seconds"):
        return duration(value)
    if key == "peak_bytes":
        return size(value)
    if key == "backends":
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def _elsewhere(directory: Path, options: list[object]) -> dict[str, Any]:
    """Return what a process of its own measures for another checkpoint.

    Raises:
        ArError: it could not.
    """
    command = [sys.executable, "-m", "ar_cli", "bench", str(directory), "--json"]
    done = subprocess.run(
        [*command, *map(str, options)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        msg = f"--against {str(directory)!r}: {said[-1] if said else 'the process failed'}"
        raise ArError(msg)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
