"""What a scorer is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from ar_schemes import LayerInfo, Scheme
    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.auto_scheme.candidates import Maker
    from ar_tuner.blocks import Block

Scores = dict[tuple[str, str], float]
"""Predicted loss by (layer, option), nats per token: what the model's divergence grows by."""
Values = dict[str, tuple[float, ...]]
"""What a scorer keeps of a layer, by option: numbers of its own choice."""


@dataclass(frozen=True)
class ScoreTask:
    """A model to score.

    Attributes:
        model: with its float weights; they are the same afterwards.
        blocks: its decoder blocks.
        layers: the free layers by name.
        open_to: by layer, the schemes it can get by option name.
        rows: tokens [N, T].
        batch_size: rows per gradient.
        seed: of whatever is drawn.
        by_block: keep one block's graph at a time.
        maker: makes the weights that options would leave.
        known: values of an earlier, interrupted or smaller scoring, by layer.
        save: called with a layer and its values as soon as they are final.
        report: called with (done, total) of the work.
    """

    model: nn.Module
    adapter: ModelAdapter
    blocks: tuple[Block, ...]
    layers: Mapping[str, LayerInfo]
    open_to: Mapping[str, Mapping[str, Scheme]]
    rows: Tensor
    batch_size: int
    seed: int
    by_block: bool
    maker: Maker
    known: Mapping[str, Values] = field(default_factory=dict)
    save: Callable[[str, Values], None] = lambda layer, values: None
    report: Callable[[int, int], None] = lambda done, total: None

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The rows, `batch_size` at a time, where the model is."""
        device = next(self.model.parameters()).device
        return self.rows.to(device).split(self.batch_size)

    def missing(self, layer: str) -> dict[str, Scheme]:
        """Return the options of a layer that quantize and whose values are not known."""
        known = self.known.get(layer, {})
        return {
            option: which
            for option, which in self.open_to[layer].items()
            if option not in known and which.weight is not None
        }


@runtime_checkable
class Scorer(Protocol):
    """Predicts what a model loses by each scheme of each layer."""

    @property
    def name(self) -> str:
        """Identifier, `fisher`; the `method` of `AutoScheme`."""

    @property
    def calibrated(self) -> bool:
        """True when scores are divergences, which a few measurements may scale, by option."""

    def values(self, task: ScoreTask) -> dict[str, Values]:
        """Return the values of every layer and option that is not known, as also saved."""

    def scores(self, values: Mapping[str, Values], tokens: int) -> Scores:
        """Return the predicted losses for the values of all layers on `tokens` tokens."""
