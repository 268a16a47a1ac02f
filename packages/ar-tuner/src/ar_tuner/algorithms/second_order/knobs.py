"""Numbers of the second-order solver."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Knobs:
    """What the solver may be told.

    Attributes:
        cycles: passes of coordinate descent at most.
        coarse_cycles: the same where activations have no more bits than weights: more gained
            nothing there (docs/log.md), and they are an eighth of the solver's time.
        damping: for 2, 3 and more bits, the share of the mean energy that is added to every
            channel before factorizing.
        pull: how far the goal moves from the float weights towards what makes up for the errors
            of earlier layers: 0 not at all, 1 as far as rows held out find good.
        ridge: share of the mean energy that tames that move.
    """

    cycles: int = 4
    coarse_cycles: int = 1
    damping: tuple[float, float, float] = (0.05, 0.02, 0.01)
    pull: float = 1.0
    ridge: float = 0.1

    def damping_for(self, bits: int) -> float:
        """Return the damping for a width."""
        return self.damping[min(max(bits, 2), 4) - 2]
