"""Layers that share one weight in several places of a model (the shared block of zamba).

Transformers ties weights by name after it has loaded them; quantized layers have none to tie, so
the layer itself goes into every place. It is left out there until its tensors have been read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ar_kernels.linear import QuantLinear

if TYPE_CHECKING:
    from collections.abc import Mapping

_WEIGHT = ".weight"


def leave_out_shared(model: Any) -> dict[str, str]:
    """Return the places of quantized layers that are elsewhere, too; nothing is there then.

    Args:
        model: a model whose layers have been replaced, before its tensors are read. What it ties
            by name loses the weights of those layers.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    places: dict[str, str] = {}
    for target, source in list(tied.items()):
        there, here = target.removesuffix(_WEIGHT), source.removesuffix(_WEIGHT)
        weights = target.endswith(_WEIGHT) and source.endswith(_WEIGHT)
        if weights and isinstance(model.get_submodule(here), QuantLinear):
            places[there] = here
    for target in [t for t in tied if t.rpartition(".")[0] in places]:
        del tied[target]
    for there in places:
        model.set_submodule(there, nn.Identity())
    return places


def put_shared(model: nn.Module, places: Mapping[str, str]) -> None:
    """Put the layers into all their places."""
    for there, here in places.items():
        model.set_submodule(there, model.get_submodule(here))
