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
    from torch import Tensor

_LEAST = 64
"""Tokens there is room for beyond those held; a quarter of them if that is more."""


class Room:
    """Memory of one layer's keys and values: [B, N, capacity, W] each, `filled` tokens in it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Copy keys and values [B, N, T, W] and leave room behind them."""
        self.filled = keys.shape[2]
        capacity = self.filled + max(_LEAST, self.filled // 4)
        self.keys, self.values = (_wider(t, capacity) for t in (keys, values))

    def holds(self, layer: Any) -> bool:
        """Tell whether a layer's tensors are all that was written here, and one more fits."""
        length = layer.keys.shape[2]
        return length == self.filled < self.keys.shape[2] and all(
            held.data_ptr() == mine.data_ptr()
            and held.shape[:2] == mine.shape[:2]
            and held.stride() == mine.stride()
            for held, mine in ((layer.keys, self.keys), (layer.values, self.values))
        )

    def append(self, layer: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Give the layer one token more, and return its keys and values."""
        at, self.filled = self.filled, self.filled + 1
        self.keys.narrow(2, at, 1).copy_(key)
        self.values.narrow(2, at, 1).copy_(value)
        layer.keys = self.keys.narrow(2, 0, self.filled)
        layer.values = self.values.narrow(2, 0, self.filled)
        return layer.keys, layer.values


def remember(cache: Any, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Add one token to layer `index` of a cache, and return the keys and values of all.

    Caches other than Transformers' plain dynamic one do it their own way.

    Args:
        cache: of Transformers.
        index: of the layer.
        key: [B, N, 1, W].
        value: as `key`.
    """
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    ours = type(cache) is DynamicCache and type(layer) is DynamicLayer
    if not ours or getattr(cache, "offloading", False) or not _is_filled(layer, key):
        done: tuple[Tensor, Tensor] = cache.update(key, value, index)
        return done
    room: Room | None = getattr(layer, "ar_room", None)
    if room is None or not room.holds(layer):
        room = Room(layer.keys, layer.values)  # type: ignore[union-attr]
        layer.ar_room = room  # type: ignore[union-attr]
    return room.append(layer, key, value)


def _is_filled(layer: Any, key: Tensor) -> bool:
    """Tell whether a layer holds tokens of the kind of a new one, without gradients."""
    if not layer.is_initialized or layer.keys.dim() != key.dim():
        return False
    alike = layer.keys.dtype == key.dtype and layer.keys.device == key.device
    fits = layer.keys.shape[:2] == key.shape[:2] and layer.keys.shape[3] == key.shape[3]
    return alike and fits and layer.keys.shape[2] > 0 and not layer.keys.requires_grad


def _wider(held: Tensor, capacity: int) -> Tensor:
    with torch.inference_mode(mode=False):  # those made within serve within only
        made = torch.empty(*held.shape[:2], capacity, held.shape[3], dtype=held.dtype)
    made.narrow(2, 0, held.shape[2]).copy_(held)
    return made
