"""Options of the tuning loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

_OPTIONS = (
    click.option(
        "--recipe",
        default="default",
        show_default=True,
        help="best, default, light, fast (no stage), rtn or opt_rtn (searched scales).",
    ),
    click.option("--algorithm", metavar="NAME", help="What quantizes a block; see `ar plugins`."),
    click.option(
        "--distill/--no-distill",
        default=None,
        help="Refine the whole model afterwards against the float model's predictions, or do not.",
    ),
    click.option(
        "--distill-scales",
        is_flag=True,
        help="The same with scales and norm gains alone, in little memory.",
    ),
    click.option("--stage", metavar="NAME", help="Refine the whole model by another stage."),
    click.option(
        "--fold/--no-fold",
        default=None,
        help="Scale channels of layers, and the norm or the rows before them back, or do not; "
        "default: where activations share powers of two (MXFP4).",
    ),
    click.option(
        "--token-weights",
        is_flag=True,
        help="Count errors as the model's predictions depend on them (second_order).",
    ),
    click.option(
        "--block-steps",
        type=int,
        help="Steps that a finished block takes on its own error; default 0.",
    ),
    click.option(
        "--clip-activations/--no-clip-activations",
        default=None,
        help="Search static ranges of activations, or take the largest magnitude; default: "
        "search those of integers.",
    ),
    click.option("--iters", type=int, help="Tuning steps per block; 0 rounds to nearest."),
    click.option("--batch-size", type=int, help="Rows per step."),
    click.option("--gradient-accumulate-steps", type=int, help="Minibatches per step."),
    click.option("--lr", type=float, help="First step of the rounding offsets."),
    click.option("--minmax-lr", type=float, help="First step of the scale factors."),
    click.option("--lr-scheduler", help="linear (default), cosine or constant."),
    click.option("--optimizer", help="sign (default: SignRound) or adam."),
    click.option("--enable-adam", is_flag=True, help="The same as --optimizer adam."),
    click.option("--momentum", type=float, help="Of signed steps; default 0."),
    click.option("--scale-init", help="search (default) or minmax (as published)."),
    click.option(
        "--enable-alg-ext",
        is_flag=True,
        help="SignRoundV2: searched scales, no outliers in the loss, frozen K-quant scales.",
    ),
    click.option(
        "--use-best-mse/--not-use-best-mse",
        "use_best_mse",
        default=None,
        help="Keep the best iterate (as published), or the last (default).",
    ),
    click.option("--validation-rows", type=int, help="Judge the best iterate on so many rows."),
    click.option("--dynamic-max-gap", type=int, help="Stop after so many steps without a better."),
    click.option("--nblocks", type=int, help="Blocks tuned as one; default 1."),
    click.option(
        "--enable-minmax-tuning/--disable-minmax-tuning",
        default=None,
        help="Tune scale factors too (default).",
    ),
    click.option(
        "--enable-quanted-input/--disable-quanted-input",
        default=None,
        help="Tune on what the quantized blocks before give (default).",
    ),
    click.option(
        "--enable-opt-rtn/--disable-opt-rtn",
        "enable_opt_rtn",
        default=None,
        help="Without steps: search scales (default, but for 8-bit integers).",
    ),
    click.option(
        "--to-quant-block-names",
        metavar="PATHS",
        help="Paths of the lists of blocks; default: found.",
    ),
    click.option(
        "--enable-deterministic-algorithms",
        is_flag=True,
        help="Let PyTorch use deterministic algorithms only.",
    ),
    click.option("--seed", type=int, help="Of the order of the calibration data."),
)
OPPOSITES = {"use_best_mse": "not_use_best_mse", "enable_opt_rtn": "disable_opt_rtn"}
"""Switches whose setting has the opposite name."""
SWITCHES = ("enable_minmax_tuning", "enable_quanted_input")
"""Switches that are on unless said otherwise."""


def tuning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that decide how layers are tuned."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def tuning_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the switches that were given, under the names `AutoRound` knows."""
    out = {name: given[name] for name in SWITCHES if given.get(name) is not None}
    if given.get("distill_scales"):
        if given.get("distill") is False:
            msg = "--distill-scales and --no-distill contradict each other: leave one out"
            raise click.UsageError(msg)
        out["distill"] = "scales"
    return out | {
        setting: not given[switch]
        for switch, setting in OPPOSITES.items()
        if given.get(switch) is not None
    }
