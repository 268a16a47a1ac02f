"""Options that several commands share, and their way into `AutoRound`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ar_cli.commands.tuning import OPPOSITES, tuning_settings
from ar_schemes import ArError, scheme

if TYPE_CHECKING:
    from collections.abc import Callable

_PLAN_OPTIONS = (
    click.option(
        "--scheme",
        help="Preset, see `ar schemes`; default: what the format implies, else W4A16.",
    ),
    click.option("--bits", type=int, help="Instead of the scheme's bits."),
    click.option("--group-size", type=int, help="Instead of the scheme's; -1: one per channel."),
    click.option("--sym/--asym", "sym", default=None, help="Instead of the scheme's symmetry."),
    click.option("--scale-dtype", help="Type of integer scales: float16, bfloat16, float32."),
    click.option(
        "--layer-config",
        metavar="JSON",
        help="Layer or pattern to scheme, bits or 'source': '{\"lm_head\": \"W8A16\"}', or a file.",
    ),
    click.option("--ignore-layers", metavar="NAMES", help="Keep these in 16 bit; comma separated."),
    click.option(
        "--keep-source",
        is_flag=True,
        help="Layers that are not quantized stay as a quantized source stores them, FP8 say.",
    ),
    click.option("--quant-lm-head", is_flag=True, help="Quantize the output head too."),
    click.option(
        "--dataset",
        metavar="SETS",
        help="Calibration data: files (.txt .json .jsonl .parquet), directories or names, "
        "separated by ','. Options follow a name after ':': split=A+B, num=ROWS, concat, "
        "apply_chat_template, system_prompt=TEXT, key=FIELD, subset=NAME. Default: an embedded "
        "text. See docs/calibration.md.",
    ),
    click.option(
        "--calibration",
        type=click.Choice(("text", "image", "mixed")),
        help="Of models that see; default: mixed where the dataset shows images, else text.",
    ),
    click.option(
        "--image-folder",
        metavar="DIRS",
        help="Where the images named by the dataset are; comma separated.",
    ),
    click.option(
        "--quant-nontext-module", is_flag=True, help="Quantize vision tower and projector too."
    ),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
    click.option("--allow-download", is_flag=True, help="Fetch models and data from the hub."),
)


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that decide what each layer gets."""
    for option in reversed(_PLAN_OPTIONS):
        command = option(command)
    return command


def settings_from(given: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `AutoRound` for options as typed; unset ones are left out."""
    known = {k: v for k, v in given.items() if k not in (*OPPOSITES, "distill_scales")}
    out = {k: v for k, v in known.items() if v is not None and v is not False}
    out |= tuning_settings(given)
    # switches that are on, or left to the recipe, unless turned off
    off = ("sym", "distill", "low_cpu_mem_usage", "clip_activations", "fold")
    out |= {name: False for name in off if given.get(name) is False}
    if "layer_config" in out:
        out["layer_config"] = layer_config(out["layer_config"])
    return out


def layer_config(text: str) -> dict[str, Any]:
    """Return a layer config typed as JSON or kept in a file.

    Raises:
        ArError: neither JSON nor a file of it, or not an object.
    """
    path = Path(text)
    try:
        raw = text if text.lstrip().startswith("{") else path.read_text(encoding="utf-8")
        value = json.loads(raw)
    except (OSError, ValueError) as error:
        msg = f"--layer-config {text!r} is neither JSON nor a readable file of it: {error}"
        raise ArError(msg) from error
    if not isinstance(value, dict):
        msg = f"--layer-config must be an object from layer names to schemes, not {value!r}"
        raise ArError(msg)
    return value


def check_scheme(name: str | None, settings: dict[str, Any]) -> None:
    """Refuse an unknown scheme or override before anything heavy is imported."""
    if name is None:
        return
    scheme(name).with_overrides({k: settings.get(k) for k in ("bits", "group_size", "sym")})
