"""Folding on its way through a run: which parameters may change, and what the journal keeps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

from ar_tuner.algorithms.base import BlockResult
from ar_tuner.errors import TunerError
from ar_tuner.folding.apply import Folding
from ar_tuner.folding.evening import is_evened

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import torch
    from torch import Tensor, nn

    from ar_schemes import LayerPlan
    from ar_tuner.run import Run
    from ar_tuner.settings import Settings

_FOLDED = "folded"


def foldable(model: nn.Module, names: Collection[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a parameter of a model, by name, may change.

    It belongs to one module only, and has a tensor of its own in the checkpoint (`names`).
    """
    holders = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    own = {name for name, p in model.named_parameters() if holders[id(p)] == 1 and name in names}
    return own.__contains__


def folds(settings: Settings, plan: LayerPlan) -> bool:
    """Tell whether anything is folded.

    Unless settings say: before second order, where a layer's activations share powers of two. (An
    algorithm that was asked for by name is given the blocks as they are.)
    """
    if settings.fold is not None:
        return settings.fold
    usual = settings.chosen.algorithm == "second_order"
    return usual and any(is_evened(row.scheme) for row in plan.quantized)


def gains_of(block: str, result: BlockResult) -> dict[str, Tensor]:
    """Return the gains and biases that folding changed in a block, by their names in the model."""
    found = {} if result.folding is None else result.folding.tensors
    return {f"{block}.{name}": value for name, value in found.items()}


def keep_block(run: Run, index: int, name: str, result: BlockResult) -> None:
    """Put a finished block on disk: what was folded, then its weights."""
    if result.folding is not None:
        run.put_state(f"{_FOLDED}-{index}", result.folding.to_tensors(), 0)
    facts = {**result.facts(), _FOLDED: result.folding is not None}
    run.save_block(index, name, result.weights, facts)


def loader(run: Run, home: torch.device) -> Callable[[int], BlockResult | None]:
    """Return a function from a block's index to what an earlier run made of it, or None."""

    def load(index: int) -> BlockResult | None:
        if index not in run.finished:
            return None
        weights, facts = run.load_block(index)
        result = BlockResult.restored({k: w.to(home) for k, w in weights.items()}, facts)
        if not facts.get(_FOLDED):
            return result
        saved = run.get_state(f"{_FOLDED}-{index}")
        if saved is None:
            msg = (
                f"what was folded in block {index} is missing from {run.directory}. Remove it to "
                "start anew."
            )
            raise TunerError(msg)
        folding = Folding.from_tensors({k: v.to(home) for k, v in saved[0].items()})
        return dataclasses.replace(result, folding=folding)

    return load
