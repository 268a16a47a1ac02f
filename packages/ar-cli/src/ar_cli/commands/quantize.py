"""`ar quantize`: the main job."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ar_cli.commands.auto import auto_options, auto_scheme, describe_choice
from ar_cli.commands.options import check_scheme, plan_options, settings_from
from ar_cli.commands.tuning import tuning_options
from ar_cli.output import duration, json_option, print_json, print_table, size
from ar_cli.progress import Progress
from ar_cli.quiet import hush
from ar_cli.spelling import program

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ar_export import VerifyReport
    from ar_kernels import QuantizedWeight
    from ar_tuner import AutoScheme


@click.command()
@click.argument("model", required=False)
@click.option(
    "--output", "--out", "-o", type=click.Path(path_type=Path), required=True, help="Directory."
)
@click.option(
    "--format",
    default="auto_round",
    show_default=True,
    help="One or several, separated by commas; see `ar formats`.",
)
@plan_options
@auto_options
@tuning_options
@click.option("--nsamples", type=int, help="Calibration rows.")
@click.option("--seqlen", type=int, help="Tokens per row.")
@click.option("--device", "device_map", help="cpu, cuda, cuda:1, 0, '0,1', auto (all), xpu, hpu.")
@click.option("--low-gpu-mem-usage", is_flag=True, help="Calibration states wait in RAM.")
@click.option(
    "--low-cpu-mem-usage/--disable-low-cpu-mem-usage",
    default=None,
    help="Read blocks when their turn comes (default), or load the whole model.",
)
@click.option("--enable-torch-compile", is_flag=True, help="Tune with compiled blocks.")
@click.option("--dtype", "model_dtype", help="Type to compute in; default: as stored.")
@click.option("--max-shard-size", help="5GB, 500MB, ...")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Default: OUTPUT.run")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace an output that is not empty.")
@click.option("--no-verify", is_flag=True, help="Do not read the result back.")
@click.option("--demo", is_flag=True, help="Quantize the embedded model and compare.")
@json_option
def quantize(  # noqa: PLR0913 - one parameter per group of options
    model: str | None,
    output: Path,
    format: str,  # noqa: A002
    demo: bool,  # noqa: FBT001
    no_verify: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
    scheme: str | None,
    dataset: str | None,
    **options: Any,
) -> int:
    """Quantize MODEL (the directory of a Transformers checkpoint) into OUTPUT."""
    if (model is None) == (not demo):
        msg = "give either the directory of a model or --demo"
        raise click.UsageError(msg)
    asked = auto_scheme(options, scheme)
    settings = settings_from(options)
    check_scheme(scheme, settings)
    hush()
    if demo:
        if asked is not None:
            msg = "--demo takes one --scheme, no --avg-bits or --target-size"
            raise click.UsageError(msg)
        if "," in format:
            msg = "--demo takes one --format"
            raise click.UsageError(msg)
        from ar_cli.demo.run import run_demo

        return run_demo(output, format, scheme, dataset, settings, as_json=as_json)
    assert model is not None
    which = scheme if asked is None else asked
    facts = quantize_one(model, output, format, which, dataset, settings, checked=not no_verify)
    if as_json:
        print_json(facts)
    else:
        _summary(facts)
    return 0 if facts["verified"] in (True, None) else 1


def quantize_one(  # noqa: PLR0913
    model: str,
    output: Path,
    format: str,  # noqa: A002
    scheme: str | AutoScheme | None,
    dataset: str | None,
    settings: dict[str, Any],
    *,
    checked: bool = True,
    listener: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Quantize and return what the summary says.

    Raises:
        ArError: whatever is wrong with the request, before work.
    """
    from ar_export import verify
    from ar_tuner import AutoRound

    seen: dict[str, Any] = {}
    reports: list[VerifyReport] = []
    show = Progress() if listener is None else listener

    def listen(event: Any) -> None:
        seen[event.kind] = event
        show(event)

    def check(path: Path, weight_of: Callable[[str], QuantizedWeight], tuned: nn.Module) -> None:
        reports.append(verify(path, expected=weight_of, against=tuned))

    job = AutoRound(model, scheme=scheme, dataset=dataset, on_event=listen, **settings)
    path = job.quantize_and_save(output, format=format, check=check if checked else None).path
    finished = seen["run_finished"]
    source = job.source or Path(model)
    return {
        "output": str(path),
        "source": str(source),
        "scheme": job.scheme.name if job.chooser is None else describe_choice(job),
        "format": format,
        "layers": len(job.plan().quantized),
        "bits_per_weight": round(finished.bits_per_weight, 4),
        "bytes_before": _weight_bytes(source),
        "bytes": _weight_bytes(path),
        "seconds": round(finished.seconds, 2),
        "peak_bytes": finished.peak_bytes,
        "verified": all(r.ok for r in reports) if reports else None,
        "findings": [vars(f) for r in reports for f in r.findings],
        "logits_difference": max((r.logits for r in reports if r.logits is not None), default=None),
    }


def _weight_bytes(path: Path) -> int:
    files = (f for f in path.rglob("*") if f.suffix in (".safetensors", ".gguf"))
    return sum(f.stat().st_size for f in files)


def _summary(facts: dict[str, Any]) -> None:
    verdict = {True: "yes, bits and logits", False: "NO", None: "not asked for"}
    print_table(
        ("", ""),
        [
            ("scheme", facts["scheme"]),
            ("layers quantized", str(facts["layers"])),
            ("bits per weight", f"{facts['bits_per_weight']:.3f} (scales included)"),
            ("size", f"{size(facts['bytes_before'])} -> {size(facts['bytes'])}"),
            ("time", duration(facts["seconds"])),
            ("peak memory", size(facts["peak_bytes"])),
            ("verified", verdict[facts["verified"]]),
        ],
    )
    for finding in facts["findings"]:
        if finding["level"] == "note":  # about engines that may not be meant; `ar verify` tells
            continue
        click.echo(f"{finding['level']}: {finding['where']}: {finding['what']}", err=True)
    next_commands(facts)


def next_commands(facts: dict[str, Any]) -> None:
    """Say what to type next, in words that can be typed as they stand."""
    ar, path, source = program(), shlex.quote(facts["output"]), shlex.quote(facts["source"])
    click.echo(f"\nNext:\n  {ar} eval {path} --against {source}")
    click.echo(f"  {ar} inspect {path}")
    click.echo(f"  {ar} generate {path} --prompt 'Return the'")
