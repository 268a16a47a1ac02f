"""Keys and values of one more token, appended without copying those before it.

Transformers' dynamic cache joins old and new ones into a new tensor at every token, in every layer:
at 4096 tokens more bytes than the weights of a small model. Here a layer's tensors are views of
memory with room behind them. A place in it is written once: a view that ends before the last token
written (a cache that was cropped or shared) is copied first, so no view ever changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_LEAST = 64
"""Tokens there is room for beyond those held; a quarter of them if that is more."""


class Room:
    """Memory of one layer's keys and values: [B, N, capacity, W] each, `filled` tokens in it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Copy keys and values [B, N, T, W] and leave room behind them."""
        self.filled = keys.shape[2]
        self.capacity = self.filled + max(_LEAST, self.filled // 4)
        self.keys, self.values = (_wider(t, self.capacity) for t in (keys, values))
        self._given: tuple[Tensor, Tensor] | None = None

    def holds(self, layer: Any) -> bool:
        """Tell whether a layer's tensors are all that was written here, and one more fits."""
        length = layer.keys.shape[2]
        return length == self.filled < self.keys.shape[2] and all(
            held.data_ptr() == mine.data_ptr()
            and held.shape[:2] == mine.shape[:2]
            and held.stride() == mine.stride()
            for held, mine in ((layer.keys, self.keys), (layer.values, self.values))
        )

    def is_untouched(self, layer: Any) -> bool:
        """Tell whether a layer has the tensors that `keep` gave it last, and one more fits."""
        given = self._given
        if given is None or self.filled >= self.capacity:
            return False
        return layer.keys is given[0] and layer.values is given[1]

    def fits(self, rows: int, heads: int, width: int, dtype: torch.dtype) -> bool:
        """Tell whether keys and values of a shape and type are held, each contiguous."""
        shape = rows, heads, self.capacity, width
        return self.keys.dtype == dtype and self.keys.shape == shape == self.values.shape

    def keep(self, layer: Any) -> None:
        """Take what was written to the next place as a token of a layer."""
        self.filled += 1
        layer.keys, layer.values = self._given = self.first(self.filled)

    def place(self) -> tuple[Tensor, Tensor]:
        """Return where the next key and value go: [B, N, 1, W]."""
        return self.keys.narrow(2, self.filled, 1), self.values.narrow(2, self.filled, 1)

    def first(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the first tokens: [B, N, tokens, W]."""
        return self.keys.narrow(2, 0, tokens), self.values.narrow(2, 0, tokens)


class LayerMemory:
    """Keys and values of one layer of a cache, for one step.

    Caches other than Transformers' plain dynamic one have no place for a token: they take it their
    own way.
    """

    def __init__(self, cache: Any, index: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Look at layer `index`, to which a key and a value [B, N, 1, W] will be added."""
        self._cache, self._index = cache, index
        layers = getattr(cache, "layers", ())
        self._layer: Any = layers[index] if index < len(layers) else None
        layer: Any = self._layer
        self._room: Room | None = None
        ours = type(cache) is DynamicCache and type(layer) is DynamicLayer
        if not ours or getattr(cache, "offloading", False) or not _is_filled(layer, shape, dtype):
            return
        room: Room | None = getattr(layer, "ar_room", None)
        if room is None or not room.holds(layer):
            room = Room(layer.keys, layer.values)
            layer.ar_room = room
        self._room = room

    def places(self) -> tuple[Tensor, Tensor] | None:
        """Return where the new key and value go, [B, N, 1, W] each; None: use `update`."""
        return None if self._room is None else self._room.place()

    def with_places(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, N, T, W] up to and with those places."""
        assert self._room is not None
        return self._room.first(self._room.filled + 1)

    def keep(self) -> None:
        """Take what was written there as a token of the past."""
        if self._room is not None:
            self._room.keep(self._layer)

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add a key and a value [B, N, 1, W], and return those of all tokens."""
        places = self.places()
        if places is None:
            done: tuple[Tensor, Tensor] = self._cache.update(key, value, self._index)
            return done
        for place, new in zip(places, (key, value), strict=True):
            place.copy_(new)
        self.keep()
        return self._layer.keys, self._layer.values


def _is_filled(layer: Any, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Tell whether a layer holds tokens of the kind of a new one, without gradients."""
    if not layer.is_initialized or layer.keys.dim() != len(shape):
        return False
    held = layer.keys
    alike = held.dtype == dtype and held.is_cpu and not held.requires_grad
    fits = held.shape[:2] == tuple(shape[:2]) and held.shape[3] == shape[3]
    return alike and fits and held.shape[2] > 0


def _wider(held: Tensor, capacity: int) -> Tensor:
    with torch.inference_mode(mode=False):  # those made within serve within only
        made = torch.empty(*held.shape[:2], capacity, held.shape[3], dtype=held.dtype)
    made.narrow(2, 0, held.shape[2]).copy_(held)
    return made
