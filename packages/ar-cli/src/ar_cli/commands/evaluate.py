"""`ar eval`: what a checkpoint lost."""

from __future__ import annotations

from pathlib import Path

import click

from ar_cli.output import json_option, print_json, print_table
from ar_cli.quiet import hush
from ar_schemes import ArError


@click.command("eval")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="The float model it came from.")
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 file; default: embedded text.")
@click.option(
    "--seqlen",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Tokens per window.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=40960,
    show_default=True,
    help="At most so many.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True, help="Type to compute in.")
@json_option
def evaluate(  # noqa: PLR0913
    directory: Path,
    against: Path | None,
    text: Path | None,
    seqlen: int,
    tokens: int,
    device: str,
    dtype: str,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Measure the perplexity of DIRECTORY, and with --against KL and top-1 agreement."""
    content = read_text(text or Path(__file__).parents[1] / "demo" / "eval.txt")
    hush()
    from ar_cli.opening import open_model, open_tokenizer
    from ar_tuner.evaluate import compare, perplexity, windows

    candidate = open_model(directory, dtype, device=device)
    tokenizer = open_tokenizer(against or directory)
    ids = windows(tokenizer, content, seqlen=seqlen, tokens=tokens)
    if against is None:
        result = {"ppl": perplexity(candidate, ids), "tokens": ids.shape[0] * (seqlen - 1)}
    else:
        result = vars(compare(open_model(against, dtype, device=device), candidate, ids))
    if as_json:
        print_json(result)
    else:
        print_table(("measure", "value"), [(_LABELS[k], v) for k, v in result.items()])


_LABELS = {
    "ppl_ref": "perplexity of the float model",
    "ppl": "perplexity",
    "kl": "KL divergence per token (nats)",
    "top1": "top-1 agreement",
    "tokens": "tokens predicted",
}


def read_text(path: Path) -> str:
    """Return a text file's content.

    Raises:
        ArError: missing, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"text file {str(path)!r} cannot be read: {error}"
        raise ArError(msg) from error
