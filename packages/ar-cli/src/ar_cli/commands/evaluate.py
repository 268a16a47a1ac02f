"""`ar eval`: what a checkpoint lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ar_cli.output import json_option, print_json, print_table
from ar_cli.quiet import hush
from ar_schemes import ArError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


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
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    help="Chats with images (.json, .jsonl), scored beside the text.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Folder of the samples' images; may be repeated.",
)
@click.option(
    "--nsamples", type=click.IntRange(min=1), default=64, show_default=True, help="At most so many."
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
    samples: Path | None,
    images: tuple[Path, ...],
    nsamples: int,
    device: str,
    dtype: str,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Measure the perplexity of DIRECTORY, and with --against KL and top-1 agreement.

    Of a model that sees, --samples adds the same measures on chats with images; tokens that stand
    for an image are not predicted.
    """
    content = read_text(text or Path(__file__).parents[1] / "demo" / "eval.txt")
    hush()
    from ar_cli.opening import open_model, open_tokenizer
    from ar_tuner.evaluate import compare, compare_on, perplexity, perplexity_on, windows

    chats = None
    if samples is not None:
        chats = image_text(against or directory, samples, images, limit=nsamples)
    candidate = open_model(directory, dtype, device=device)
    tokenizer = open_tokenizer(against or directory)
    ids = windows(tokenizer, content, seqlen=seqlen, tokens=tokens)
    reference = None if against is None else open_model(against, dtype, device=device)
    result: dict[str, Any]
    if reference is None:
        result = {"ppl": perplexity(candidate, ids), "tokens": ids.shape[0] * (seqlen - 1)}
    else:
        result = vars(compare(reference, candidate, ids))
    if chats is not None:
        never = marks(getattr(candidate, "config", None))
        if reference is None:
            ppl, count = perplexity_on(candidate, chats, never=never)
            found: dict[str, Any] = {"ppl": ppl, "tokens": count}
        else:
            found = vars(compare_on(reference, candidate, chats, never=never))
        result = result | {f"samples_{key}": value for key, value in found.items()}
    if as_json:
        print_json(result)
    else:
        print_table(("measure", "value"), [(_label(k), v) for k, v in result.items()])


_LABELS = {
    "ppl_ref": "perplexity of the float model",
    "ppl": "perplexity",
    "kl": "KL divergence per token (nats)",
    "top1": "top-1 agreement",
    "tokens": "tokens predicted",
}


def _label(key: str) -> str:
    plain = key.removeprefix("samples_")
    return _LABELS[plain] if plain == key else f"image-text samples: {_LABELS[plain]}"


def image_text(
    model: Path, samples: Path, images: Sequence[Path], *, limit: int
) -> list[dict[str, Tensor]]:
    """Return the inputs that a model's processor makes of chats with images, a sample each.

    Raises:
        ArError: ar-vlm is not installed, or samples or images cannot be read.
    """
    try:
        from ar_vlm import Inputs, read_samples
    except ImportError as error:
        msg = "--samples needs ar-vlm: pip install 'ar-cli[vlm]'"
        raise ArError(msg) from error
    chats = read_samples(samples, images=images, limit=limit)
    inputs = Inputs.from_pretrained(model)
    return [inputs.build(chat) for chat in chats]


def marks(config: Any) -> set[int]:
    """Return the tokens that stand for images and videos in a model's inputs."""
    names = (f"{kind}_token_{end}" for kind in ("image", "video") for end in ("id", "index"))
    found = (getattr(config, name, None) for name in names)
    return {int(token) for token in found if token is not None}


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
