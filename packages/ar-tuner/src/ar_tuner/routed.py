"""How many calibration tokens each expert was sent, and what is said of those that got few."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ar_tuner.watching import watching

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from ar_tuner.algorithms.base import Target
    from ar_tuner.events import Level
    from ar_tuner.parts import WeightRef

FEW = 64
"""An expert with fewer tokens than that is tuned on next to nothing."""


@dataclass(frozen=True)
class Routed:
    """The experts of one list, and the tokens that each was sent.

    Attributes:
        experts: name of the list, `model.layers.3.mlp.experts`.
        tokens: by expert; all zero where what experts are given cannot be seen.
    """

    experts: str
    tokens: tuple[int, ...]

    @property
    def remark(self) -> tuple[Level, str] | None:
        """What a user should know (level, text), or None."""
        count, starved = len(self.tokens), sum(n < FEW for n in self.tokens)
        if not any(self.tokens):
            return "warning", (
                f"{self.experts}: what its {count} experts are given cannot be seen in this model; "
                "they are quantized by their weights alone"
            )
        if not starved:
            return None
        none = sum(n == 0 for n in self.tokens)
        text = (
            f"{self.experts}: {starved} of {count} experts were sent fewer than {FEW} calibration "
            f"tokens ({none} none); more rows (nsamples) help"
        )
        return ("warning" if none else "info"), text


@contextlib.contextmanager
def counting(block: nn.Module, targets: Sequence[Target]) -> Iterator[list[Routed]]:
    """Yield a list that holds, after the context, the tokens of each list of experts of a block."""
    lists: dict[str, dict[int, str]] = {}
    first: list[WeightRef] = []
    for ref in (t.ref for t in targets):
        if ref.expert is not None and ref.expert not in lists.setdefault(ref.module, {}):
            lists[ref.module][ref.expert] = ref.layer
            first.append(ref)
    tokens: dict[str, int] = {}

    def watch(refs: Sequence[WeightRef], x: Tensor) -> None:
        for ref in refs:
            tokens[ref.layer] = tokens.get(ref.layer, 0) + x.numel() // x.shape[-1]

    out: list[Routed] = []
    with watching(block, first, watch):
        yield out
    for experts in lists.values():
        name = next(iter(experts.values())).rpartition(".")[0].rpartition(".")[0]
        counts = (tokens.get(experts.get(i, ""), 0) for i in range(max(experts) + 1))
        out.append(Routed(name, tuple(counts)))
