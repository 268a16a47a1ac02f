"""Recipes: how much work a quantization does, under the names auto-round's users know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Numbers of one recipe.

    Attributes:
        iters: tuning steps per block (`second_order`: cycles of descent at most); 0 rounds to
            nearest.
        nsamples, seqlen: calibration rows and their length in tokens.
        batch_size: rows per step.
        lr: first step of the rounding offsets, in quantization steps; None: see `auto_lr`.
        minmax_lr: first step of the scale factors; None: as `lr`.
        algorithm: name of the algorithm.
    """

    name: str
    iters: int
    nsamples: int
    seqlen: int = 2048
    batch_size: int = 8
    lr: float | None = None
    minmax_lr: float | None = None
    algorithm: str = "signround"


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("best", iters=1000, nsamples=512),
        Recipe("default", iters=200, nsamples=128),
        Recipe("light", iters=50, nsamples=128, lr=5e-3),
        Recipe("fast", iters=4, nsamples=128, algorithm="second_order"),
        Recipe("rtn", iters=0, nsamples=1, algorithm="rtn"),
    )
}


def auto_lr(iters: int, bits: int) -> float:
    """Return the first step that fits a number of steps.

    1 / iters, so that an offset can travel at most half a quantization step over the linear
    decay; twice that for long runs at 2 and 3 bits (SignRoundV2, arXiv 2512.04746).
    """
    if iters >= 1000 and bits <= 3:
        return 2.0 / iters
    return 1.0 / iters
