"""Options of a mixed precision, their way into `AutoScheme`, and what was chosen as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ar_cli.output import print_table, size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ar_tuner import AutoRound, AutoScheme
    from ar_tuner.auto_scheme import Choice

SHOWN = 12
"""Points of the front in a table."""
_NAMES = (
    *("avg_bits", "target_size", "options", "shared_layers", "ignore_scale_zp_bits"),
    *("score_method", "score_samples", "score_cache"),
)
_OPTIONS = (
    click.option(
        "--avg-bits",
        "--target-bits",
        type=float,
        help="Choose a scheme per layer: bits per weight on average, scales included.",
    ),
    click.option("--target-size", help="The same, for weight files of a size: 3.2GB, 800MB."),
    click.option("--options", metavar="NAMES", help="Schemes to choose from: W2A16,W4A16,W8A16."),
    click.option(
        "--shared-layers",
        multiple=True,
        metavar="NAMES",
        help="These get one scheme per block; comma separated. 'none': not even fused layers do.",
    ),
    click.option("--ignore-scale-zp-bits", is_flag=True, help="Count the bits of codes alone."),
    click.option("--score-method", help="Scorer: fisher (default), delta_loss or a plugin's."),
    click.option("--score-samples", type=int, help="Rows of text to score layers with."),
    click.option("--score-cache", help="File of scores to go on with; default: in the user cache."),
)


def auto_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a mixed precision."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def auto_scheme(given: dict[str, Any], scheme: str | None) -> AutoScheme | None:
    """Return the mixed precision that was asked for and take its options out, or None.

    Raises:
        click.UsageError: some of the options without a target, or with `--scheme`.
        TunerError, SchemeError: a value that cannot be.
    """
    mine = {name: given.pop(name, None) for name in _NAMES}
    typed = [f"--{name.replace('_', '-')}" for name, value in mine.items() if value]
    if mine["avg_bits"] is None and mine["target_size"] is None:
        if typed:
            msg = f"{', '.join(typed)} needs --avg-bits or --target-size"
            raise click.UsageError(msg)
        return None
    if scheme is not None:
        msg = "--scheme is one scheme for all; with --avg-bits or --target-size name --options"
        raise click.UsageError(msg)
    if not mine["options"]:
        msg = "--avg-bits and --target-size need --options, such as W2A16,W4A16,W8A16"
        raise click.UsageError(msg)
    from ar_tuner import AutoScheme

    return AutoScheme(
        mine["avg_bits"],
        mine["options"],
        shared_layers=_shared(mine["shared_layers"] or ()),
        method=mine["score_method"] or "fisher",
        ignore_scale_zp_bits=bool(mine["ignore_scale_zp_bits"]),
        nsamples=mine["score_samples"],
        target_size=mine["target_size"],
        cache=mine["score_cache"],
    )


def describe_choice(job: AutoRound) -> str:
    """Return what was chosen in a few words."""
    assert job.chooser is not None
    return ", ".join(f"{n} x {name}" for name, n in _counts(job.chooser.choices[0]).items())


def print_front(choice: Choice) -> None:
    """Print some plans of the front, and the chosen one among them."""
    points = list(choice.front)
    step = max(1, -(-len(points) // SHOWN))
    kept = points[::step] + ([] if (len(points) - 1) % step == 0 else points[-1:])
    rows = [(point.bits, point.bytes, point.loss, _listed(point.layers), "") for point in kept]
    rows.append((choice.bits, choice.bytes, choice.loss, _listed(_counts(choice)), "chosen"))
    rows.sort(key=lambda row: row[0])
    print_table(
        ("bits", "size", "predicted loss", "layers", ""),
        [(f"{bits:.3f}", size(count), f"{loss:.4g}", *rest) for bits, count, loss, *rest in rows],
    )


def _counts(choice: Choice) -> dict[str, int]:
    counts: dict[str, int] = {}
    for option in choice.picks.values():
        counts[option] = counts.get(option, 0) + 1
    return counts


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} x {name}" for name, n in sorted(counts.items()))


def _shared(typed: tuple[str, ...]) -> list[list[str]] | None:
    if not typed:
        return None
    if typed == ("none",):
        return []
    return [[part.strip() for part in group.split(",") if part.strip()] for group in typed]
