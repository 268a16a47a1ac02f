"""Checks of the settings of the tuning loop, before any work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ar_schemes import unknown_name
from ar_tuner.algorithms.optimizers import OPTIMIZERS, SCHEDULES
from ar_tuner.errors import TunerError
from ar_tuner.recipes import RECIPES

if TYPE_CHECKING:
    from ar_tuner.settings import Settings

NOT_DONE = {
    "enable_norm_bias_tuning": "norms and biases are not tuned: their gain is small and auto-round "
    "itself advises against it",
    "enable_lfq": "the last block is tuned like all others, against its float output",
}
"""Arguments of auto-round that have no counterpart here, and why."""

_CHOICES = {
    "scale_init": ("search", "minmax"),
    "optimizer": OPTIMIZERS,
    "lr_scheduler": tuple(SCHEDULES),
}
_SWITCHES = (
    *("quant_lm_head", "enable_quanted_input", "enable_minmax_tuning", "not_use_best_mse"),
    *("enable_alg_ext", "enable_adam", "enable_deterministic_algorithms", "token_weights"),
    *("quant_nontext_module", "keep_source"),
)
_OPEN = ("disable_opt_rtn", "distill", "clip_activations", "fold")
"""Switches that may be left open."""
SCALES = "scales"
"""Of `distill`: codes stay."""
_FURTHER: dict[str, tuple[str, ...]] = {"distill": (SCALES,)}
_LOOP_ONLY = (
    *("enable_alg_ext", "optimizer", "enable_adam", "momentum", "lr_scheduler", "nblocks"),
    *("gradient_accumulate_steps", "validation_rows", "dynamic_max_gap", "stage"),
    *("token_weights", "block_steps"),
)
_COUNTS = {"gradient_accumulate_steps": 1, "nblocks": 1, "validation_rows": 0, "block_steps": 0}


def refuse_undone(given: Mapping[str, Any]) -> None:
    """Refuse arguments of auto-round that are not done here, unless they are switched off.

    Raises:
        TunerError: one of them is asked for.
    """
    for name, why in NOT_DONE.items():
        if given.get(name):
            msg = f"{name} is not supported: {why}. Leave it out."
            raise TunerError(msg)


def check_tuning(settings: Settings) -> None:
    """Refuse values of the tuning loop that cannot be, or that contradict each other.

    Raises:
        TunerError: with the value, what is allowed, and what to do.
    """
    for name, allowed in _CHOICES.items():
        value = getattr(settings, name)
        if value not in allowed:
            raise TunerError(unknown_name(name, str(value), allowed))
    for name in (*_SWITCHES, *_OPEN):
        value = getattr(settings, name)
        others = _FURTHER.get(name, ())
        left = name in _OPEN and value is None
        if not isinstance(value, bool) and not left and value not in others:
            words = " or ".join(map(repr, (*others, True, False)))
            msg = f"{name} {value!r} is not allowed: use {words}"
            raise TunerError(msg)
    for name, least in _COUNTS.items():
        check_whole(name, getattr(settings, name), least)
    check_whole("dynamic_max_gap", settings.dynamic_max_gap, -1)
    check_whole("seed", settings.seed, 0)
    if not isinstance(settings.layer_config, Mapping):
        msg = (
            f"layer_config {settings.layer_config!r} is not allowed: use a dict from layer names "
            'or patterns to schemes, such as {"down_proj": "W8A16"}'
        )
        raise TunerError(msg)
    for name in ("ignore_layers", "to_quant_block_names"):
        _check_names(name, getattr(settings, name))
    momentum = settings.momentum
    if not isinstance(momentum, (int, float)) or not 0 <= momentum < 1 or math.isnan(momentum):
        msg = f"momentum {momentum!r} is not allowed: use a number from 0 up to, not including, 1"
        raise TunerError(msg)
    _check_together(settings)


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse anything but a whole number of at least `least`.

    Raises:
        TunerError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        msg = f"{name} {value!r} is not allowed: use a whole number of at least {least}"
        raise TunerError(msg)


def _check_names(name: str, value: object) -> None:
    listed = isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value)
    if not (listed or isinstance(value, str) or value is None):
        msg = f"{name} {value!r} is not allowed: use names in a list, or separated by commas"
        raise TunerError(msg)


def _check_together(settings: Settings) -> None:
    """Refuse settings of which one would silently undo the other."""
    adam = settings.enable_adam or settings.optimizer == "adam"
    selecting = not settings.not_use_best_mse
    recipe = RECIPES[settings.recipe]
    contradictions = (
        (
            adam and settings.momentum > 0,
            f"momentum {settings.momentum} belongs to optimizer 'sign'; Adam has its own",
        ),
        (
            settings.enable_alg_ext and settings.scale_init == "minmax",
            "enable_alg_ext starts from searched scales: leave out scale_init 'minmax'",
        ),
        (
            settings.validation_rows > 0 and not selecting,
            f"validation_rows {settings.validation_rows} chooses the iterate, but the last one is "
            "returned: give not_use_best_mse=False too",
        ),
        (
            settings.dynamic_max_gap > 0 and not selecting,
            f"dynamic_max_gap {settings.dynamic_max_gap} waits for a better iterate, but the last "
            "one is returned: give not_use_best_mse=False too",
        ),
        (
            recipe.iters == 0 and bool(settings.iters),
            f"recipe {settings.recipe!r} rounds to nearest, without steps: leave out iters "
            f"{settings.iters}, or choose recipe 'default'",
        ),
        (
            settings.recipe == "opt_rtn" and settings.disable_opt_rtn is True,
            "recipe 'opt_rtn' is what disable_opt_rtn switches off: choose recipe 'rtn'",
        ),
        (
            settings.recipe == "rtn" and settings.disable_opt_rtn is False,
            "recipe 'rtn' rounds with plain scales: for searched ones choose recipe 'opt_rtn'",
        ),
        (
            bool(settings.fold) and settings.nblocks > 1,
            f"fold looks at one block at a time, nblocks {settings.nblocks} tunes several as one",
        ),
        (
            settings.token_weights and settings.chosen.algorithm != "second_order",
            f"token_weights belong to algorithm 'second_order', not {settings.chosen.algorithm!r}",
        ),
        (
            settings.distill is not None and settings.stage is not None,
            f"distill {settings.distill} and stage {settings.stage!r} both say what follows the "
            "blocks: leave one out",
        ),
    )
    for wrong, msg in contradictions:
        if wrong:
            raise TunerError(msg)
    if settings.chosen.iters == 0:
        _check_idle(settings)


def _check_idle(settings: Settings) -> None:
    """Refuse settings of the loop where there are no steps."""
    usual = {f.name: f.default for f in dataclasses.fields(settings)}
    names = [*_LOOP_ONLY, *(["distill"] if settings.distill else [])]
    names += [] if settings.algorithm == settings.chosen.algorithm else ["algorithm"]
    for name in names:
        value = getattr(settings, name)
        if value != usual[name]:
            msg = (
                f"{name} {value!r} belongs to tuning, but this run rounds to nearest (iters 0): "
                "leave it out, or give iters"
            )
            raise TunerError(msg)
