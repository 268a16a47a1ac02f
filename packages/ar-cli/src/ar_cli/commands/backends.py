"""`ar backends`: the kernels there are, and which one runs what."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ar_cli.output import json_option, print_json, print_records, print_table
from ar_schemes import ArError

if TYPE_CHECKING:
    from ar_kernels.backends import Need

_SAMPLE = (4096, 4096)
"""Shape for which schemes are judged when no checkpoint is given."""
_DTYPES = ("bfloat16", "float16", "float32")


@click.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--explain", is_flag=True, help="Say of every backend why it is chosen or not.")
@click.option("--device", default="cpu", show_default=True, help="Device the layers would run on.")
@click.option(
    "--dtype", type=click.Choice(_DTYPES), help="Type of the activations [default: the model's]."
)
@json_option
def backends(
    directory: Path | None,
    *,
    explain: bool,
    device: str,
    dtype: str | None,
    as_json: bool,
) -> None:
    """List the kernel backends; with DIRECTORY, which one runs each kind of its layers.

    --explain without a directory judges every scheme at 4096 x 4096.
    """
    if directory is None and not explain:
        _list(as_json=as_json)
        return
    kinds = _schemes(device, dtype) if directory is None else _layers(directory, device, dtype)
    found = [_judged(kind, need, count) for (kind, need), count in kinds.items()]
    if as_json:
        print_json(found)
        return
    print_table(
        ("layers", "count", "backend", "why"),
        [(f["layers"], f["count"], f["backend"] or "none", f["why"]) for f in found],
    )
    if explain:
        for one in found:
            click.echo(f"\n{one['layers']}")
            print_table(("backend", "verdict"), list(one["verdicts"].items()))
    for line in dict.fromkeys(f["better"] for f in found if f["better"]):
        click.echo(f"\n{line}")
        break


def _list(*, as_json: bool) -> None:
    from ar_kernels import backends as all_backends
    from ar_kernels.backends import Declares

    found = sorted(all_backends().values(), key=lambda b: -b.priority)
    print_records(
        [
            {
                "name": b.name,
                "priority": b.priority,
                "supports": str(b.support) if isinstance(b, Declares) else "see --explain",
                "status": b.status,
                "here": b.missing() or "usable",
            }
            for b in found
        ],
        ("name", "priority", "supports", "status", "here"),
        as_json=as_json,
    )


def _judged(kind: str, need: Need, count: int) -> dict[str, Any]:
    """Return what is said of one kind of layers."""
    from ar_kernels import backends as all_backends
    from ar_kernels.backends.select import better_if_installed, choose, judge

    try:
        choice = choose(need)
    except ArError:
        ranked = sorted(all_backends().values(), key=lambda b: -b.priority)
        verdicts = {b.name: str(judge(b, need).hurdle) for b in ranked}
        return _row(kind, count, None, "no backend can run it", verdicts, None)
    verdicts = dict(choice.reasons)
    why = verdicts[choice.backend.name]
    if need.activation is not None and choice.need.activation is None:
        why += ", activations quantized before it"
    better = better_if_installed(need, choice.backend)
    return _row(kind, count, choice.backend.name, why, verdicts, better)


def _row(
    kind: str,
    count: int,
    backend: str | None,
    why: str,
    verdicts: dict[str, str],
    better: str | None,
) -> dict[str, Any]:
    return {
        "layers": kind,
        "count": count,
        "backend": backend,
        "why": why,
        "verdicts": verdicts,
        "better": better,
    }


def _schemes(device: str, dtype: str | None) -> dict[tuple[str, Need], int]:
    import torch

    from ar_kernels.backends import Need
    from ar_schemes import schemes

    kind = getattr(torch, dtype or "bfloat16")
    return {
        (s.name, Need(s.weight, *_SAMPLE, device, kind, s.activation)): 1
        for s in schemes().values()
        if s.weight is not None
    }


def _layers(path: Path, device: str, dtype: str | None) -> dict[tuple[str, Need], int]:
    """Return the kinds of layers of a checkpoint with how many there are.

    Raises:
        ArError: no checkpoint, or one without quantized layers.
    """
    import torch

    from ar_export import open_checkpoint
    from ar_kernels.backends import Need

    found = open_checkpoint(path)
    if not found.quantized:
        msg = f"{path} holds no quantized layers, so no backend is needed"
        raise ArError(msg)
    named = dtype or str(found.config.get("dtype") or found.config.get("torch_dtype") or "float32")
    kind = getattr(torch, named.removeprefix("torch."), torch.float32)
    out: Counter[tuple[str, Need]] = Counter()
    for entry in found.quantized.values():
        assert entry.scheme.weight is not None
        need = Need(
            entry.scheme.weight, entry.rows, entry.columns, device, kind, entry.scheme.activation
        )
        act = "" if need.activation is None else f", activations {need.activation}"
        out[f"{need.spec} [{need.rows}, {need.columns}]{act}", need] += 1
    return dict(out)
