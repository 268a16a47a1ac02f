"""Keys of files to keys of a model, as Transformers renames, fuses and splits while it loads."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ar_kernels.hf.experts import Conversion
from ar_kernels.hf.trials import places_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from ar_kernels.hf.trials import Placed


def sources_of(conversion: Any) -> tuple[str, ...]:
    """Return what identifies a conversion of Transformers."""
    return tuple(conversion._original_source_patterns)  # noqa: SLF001 - identifies it


class Renaming:
    """Keys of files to keys of a model, as transformers renames them while it loads."""

    def __init__(self, model: Any) -> None:
        transforms = get_model_conversion_mapping(model) or []
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
        self._prefix = model.base_model_prefix
        self._model = model
        self._state: dict[str, torch.Tensor] = model.state_dict()

    def __call__(self, key: str) -> str:
        """Return the model's key for a key of the files."""
        found, _ = self._renamed(key, self._converters)
        if found not in self._state and key in self._state:
            found = rename_source_key(key, [], [], self._prefix, self._state)[0]
        return found

    def fusing(self, key: str) -> Conversion | None:
        """Return how transformers would fuse a key into a parameter of the model, or None."""
        target, pattern = self._renamed(key, self._converters)
        if pattern is None or target not in self._state:
            return None
        using = next(c for c in self._converters if pattern in c.source_patterns)
        return Conversion(
            self._renamed(key, [])[0],
            target,
            using.source_patterns.index(pattern),
            len(using.source_patterns),
            [type(operation).__name__ for operation in using.operations],
            sources_of(using),
        )

    def trial(self, keys: Sequence[str]) -> dict[str, Placed]:
        """Return where keys that are fused come to lie, as far as trying tells."""
        groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for key in keys:
            target, pattern = self._renamed(key, self._converters)
            if pattern is not None:
                using = next(c for c in self._converters if pattern in c.source_patterns)
                groups.setdefault((target, using.source_patterns[0]), []).append((key, pattern))
        out: dict[str, Placed] = {}
        for (target, first), members in groups.items():
            using = next(c for c in self._converters if first in c.source_patterns)
            convert = functools.partial(self._convert, using, target, dict(members))
            out |= places_of([key for key, _ in members], convert)
        return out

    def _convert(
        self, using: Any, target: str, patterns: Mapping[str, str], tensors: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Return what a conversion makes of tensors by name, by name in the model."""
        fresh = copy.deepcopy(using)
        for key, tensor in tensors.items():
            fresh.add_tensor(target, key, patterns[key], tensor)
        made = fresh.convert(target, model=self._model, config=self._model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in made.items()}

    def _renamed(self, key: str, converters: list[Any]) -> tuple[str, str | None]:
        rest = (self._prefix, self._state)
        found, pattern = rename_source_key(key, self._renamings, converters, *rest)
        return str(found), pattern
