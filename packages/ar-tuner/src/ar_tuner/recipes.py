"""Recipes: how much work a quantization does, under the names auto-round's users know."""

from __future__ import annotations

from dataclasses import dataclass

from ar_tuner.stages import StageSettings

COARSE = 2
"""Bits up to which the stage takes more rows."""


@dataclass(frozen=True)
class Recipe:
    """Numbers of one recipe.

    Attributes:
        iters: tuning steps per block; 0 rounds to nearest.
        nsamples, seqlen: calibration rows and their length in tokens.
        batch_size: rows per step.
        lr: first step of the rounding offsets, in quantization steps; None: see `auto_lr`.
        minmax_lr: first step of the scale factors; None: as `lr`.
        disable_opt_rtn: without steps, round with plain scales instead of searched ones.
        tuned_by: algorithm for blocks, where there are steps.
        stage: what refines the whole model afterwards, with as many steps; None: nothing.
        flat: the stage moves scales and gains only, in little memory.
    """

    name: str
    iters: int
    nsamples: int
    seqlen: int = 2048
    batch_size: int = 8
    lr: float | None = None
    minmax_lr: float | None = None
    disable_opt_rtn: bool | None = None
    tuned_by: str = "second_order"
    stage: str | None = "distill"
    flat: bool = False

    @property
    def algorithm(self) -> str:
        """Name of the algorithm."""
        if self.iters:
            return self.tuned_by
        return "rtn" if self.disable_opt_rtn else "opt_rtn"

    def stage_settings(
        self, seed: int, *, bits: int = COARSE, activations: bool = False
    ) -> StageSettings:
        """Return the numbers of the stage: about as many steps as a block has, of half its rows.

        Args:
            seed: of the order of rows.
            bits: the fewest that a weight has. Codes of two bits have much to gain: they get more
                rows. Others get no more than what SignRound's steps would take in time.
            activations: they are quantized too. What that adds to gradients is averaged over more
                rows than a batch has; SignRound's own steps take twice as long then.
        """
        if activations:
            return StageSettings(self.iters, max(1, self.batch_size * 3 // 2), seed)
        if bits <= COARSE:
            return StageSettings(self.iters, max(1, self.batch_size * 5 // 8), seed)
        return StageSettings(max(1, self.iters * 7 // 8), max(1, self.batch_size // 2), seed)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("best", iters=1000, nsamples=512),
        Recipe("default", iters=200, nsamples=128),
        Recipe("light", iters=50, nsamples=128, lr=5e-3),
        Recipe("fast", iters=4, nsamples=128, stage=None),
        Recipe("rtn", iters=0, nsamples=1, disable_opt_rtn=True),
        Recipe("opt_rtn", iters=0, nsamples=128),
    )
}
SPELLINGS = {"opt-rtn": "opt_rtn"}
"""Other ways to write a recipe's name."""


def auto_lr(iters: int, bits: int) -> float:
    """Return the first step that fits a number of steps.

    1 / iters, so that an offset can travel at most half a quantization step over the linear
    decay; twice that for long runs at 2 and 3 bits (SignRoundV2, arXiv 2512.04746).
    """
    if iters >= 1000 and bits <= 3:
        return 2.0 / iters
    return 1.0 / iters
