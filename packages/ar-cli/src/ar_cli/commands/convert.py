"""`ar convert` and `ar compare`."""

from __future__ import annotations

from pathlib import Path

import click

from ar_cli.output import json_option, print_json, print_table, size
from ar_cli.quiet import hush


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--to", "format", required=True, metavar="FORMAT", help="See `ar formats`.")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Directory.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="5GB, 500MB, ...")
@click.option("--overwrite", is_flag=True, help="Replace an output that is not empty.")
@json_option
def convert(  # noqa: PLR0913
    directory: Path,
    format: str,  # noqa: A002
    output: Path,
    max_shard_size: str,
    overwrite: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
) -> None:
    """Write the quantized checkpoint DIRECTORY in another format, with the very same codes."""
    hush()
    from ar_export.convert import convert as move
    from ar_tuner.settings import make_settings

    limit = make_settings({"max_shard_size": max_shard_size}).shard_bytes
    path = move(directory, output, format, max_shard_bytes=limit, overwrite=overwrite)
    total = sum(f.stat().st_size for f in path.iterdir() if f.suffix in (".safetensors", ".gguf"))
    if as_json:
        print_json({"output": str(path), "format": format, "bytes": total})
    else:
        click.echo(f"{path}: {format}, {size(total)}")


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@json_option
def compare(first: Path, second: Path, as_json: bool) -> int:  # noqa: FBT001
    """Show what differs between two checkpoints, of any formats; status 1 if anything does."""
    hush()
    from ar_export.compare import compare_checkpoints

    found = compare_checkpoints(first, second)
    if as_json:
        print_json(
            {
                "same": found.same,
                "layers": found.layers,
                "tensors": found.tensors,
                "differences": [vars(d) for d in found.differences],
            }
        )
        return 0 if found.same else 1
    if found.differences:
        rows = [
            (d.name, d.what, "-" if d.largest is None else f"{d.largest:.3g}")
            for d in found.differences
        ]
        print_table(("name", "difference", "largest"), rows)
    verdict = "the same" if found.same else f"{len(found.differences)} differ"
    click.echo(f"{found.layers} quantized layers, {found.tensors} other tensors: {verdict}")
    return 0 if found.same else 1
