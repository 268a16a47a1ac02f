"""Budgets: what a target allows the free layers, and the front of what they could cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ar_tuner.auto_scheme.front import FrontPoint
from ar_tuner.auto_scheme.solver import Choices, front, solve
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ar_tuner.auto_scheme.scorers import Scores
    from ar_tuner.auto_scheme.solver import Solution
    from ar_tuner.auto_scheme.space import Space, Unit


@dataclass(frozen=True)
class Budget:
    """What the free layers may cost together, in bits.

    Attributes:
        target: what was asked for.
        by_size: bytes of the files were, not an average of bits.
        codes_only: scales and zero points do not count.
        limit: bits left for the free layers.
    """

    target: float
    by_size: bool
    codes_only: bool
    limit: int

    def costs(self, space: Space, unit: Unit) -> tuple[int, ...]:
        """Return what a unit costs under each of its options."""
        prices = space.code_bits if self.codes_only else space.bits
        return tuple(sum(prices[layer, o] for layer in unit.layers) for o in unit.options)


def budget_for(
    space: Space, *, avg_bits: float | None = None, size: int | None = None, codes_only: bool
) -> Budget:
    """Return the budget of a target.

    Raises:
        TunerError: no choice of options reaches the target.
    """
    if size is not None:
        out = Budget(size, True, False, 8 * (size - space.fixed_bytes))
    else:
        assert avg_bits is not None
        out = Budget(avg_bits, False, codes_only, int(avg_bits * space.weights) - space.fixed_bits)
    costs = [out.costs(space, unit) for unit in space.units]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    if out.limit < least:
        raise TunerError(_too_small(space, out, least))
    if size is None and avg_bits is not None:
        highest = (most + space.fixed_bits) / space.weights
        if avg_bits > highest + 1e-3:  # noqa: PLR2004 - a thousandth of a bit is rounding
            msg = (
                f"avg_bits {avg_bits} is more than the options can use ({highest:.4f} with the "
                "largest everywhere). Add an option of more bits, or use that scheme alone."
            )
            raise TunerError(msg)
    return out


def _too_small(space: Space, budget: Budget, least: int) -> str:
    fixed = ""
    if space.fixed_bits:
        fixed = " Layers that stay as they are count too (see `ar plan`)."
    if budget.by_size:
        have = (least + 7) // 8 + space.fixed_bytes
        return (
            f"target_size {budget.target} is less than the smallest possible, {have} bytes: "
            f"{space.fixed_bytes} beside the free layers and {have - space.fixed_bytes} for them "
            f"at their cheapest. Use a larger target or an option of fewer bits.{fixed}"
        )
    lowest = (least + space.fixed_bits) / space.weights
    return (
        f"avg_bits {budget.target} is less than the options allow ({lowest:.4f} with the cheapest "
        f"everywhere, scales and zero points included). Use at least that, or an option of fewer "
        f"bits.{fixed}"
    )


def choices(space: Space, budget: Budget, losses: Scores) -> list[Choices]:
    """Return costs and predicted losses of every unit; options that quantize nothing lose none."""
    return [
        Choices(
            budget.costs(space, unit),
            tuple(sum(losses.get((la, o), 0.0) for la in unit.layers) for o in unit.options),
        )
        for unit in space.units
    ]


def solved(space: Space, budget: Budget, losses: Scores) -> dict[str, str]:
    """Return the option of every free layer: the least predicted loss within the budget."""
    return picks_of(space, solve(choices(space, budget, losses), budget.limit))


def picks_of(space: Space, solution: Solution) -> dict[str, str]:
    """Return option names by layer."""
    return {
        layer: unit.options[pick]
        for unit, pick in zip(space.units, solution.picks, strict=True)
        for layer in unit.layers
    }


def bits_of(space: Space, picks: Mapping[str, str], *, codes_only: bool) -> float:
    """Return the average bits per weight."""
    prices = space.code_bits if codes_only else space.bits
    used = sum(prices[layer, option] for layer, option in picks.items())
    return (used + space.fixed_bits) / space.weights


def bytes_for(space: Space, picks: Mapping[str, str]) -> int:
    """Return the bytes of the weight files."""
    return space.fixed_bytes + sum(space.bits[pick] for pick in picks.items()) // 8


def loss_of(picks: Mapping[str, str], losses: Scores) -> float:
    """Return the predicted loss."""
    return sum(losses.get(pick, 0.0) for pick in picks.items())


def front_of(space: Space, budget: Budget, losses: Scores) -> tuple[FrontPoint, ...]:
    """Return the plans of least predicted loss for their cost, cheapest first."""
    out = []
    for solution in front(choices(space, budget, losses)):
        picks = picks_of(space, solution)
        out.append(
            FrontPoint(
                bits=bits_of(space, picks, codes_only=budget.codes_only),
                bytes=bytes_for(space, picks),
                loss=solution.loss,
                layers=Counter(picks.values()),
            )
        )
    return tuple(out)
