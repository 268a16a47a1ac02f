"""Which tensors of a checkpoint make which tensors of the model, and reading some of them.

Transformers renames keys and fuses tensors (experts, say) while it loads; its own rules are applied
here to a part of the keys at a time, so that one block can be read alone.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ar_tuner.blocks import is_linear
from ar_tuner.names import map_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch
    from torch import Tensor

    from ar_tuner.source import Source


@dataclass(frozen=True)
class Piece:
    """Tensors of the model that come from tensors of the source in one go.

    Attributes:
        targets: their names in the model; the first one names the piece.
        sources: names in the source, in natural order.
        convert: makes the former of the latter; None: one tensor, as it is.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Wiring:
    """How a model is made of a checkpoint.

    Attributes:
        pieces: by the first target of each.
        unknown: tensors of the source that the model does not have.
        plain: names of the model that Transformers, too, takes as they are.
    """

    pieces: Mapping[str, Piece]
    unknown: tuple[str, ...]
    plain: frozenset[str]

    @property
    def names(self) -> dict[str, str]:
        """Name in the model to name in the source, where one tensor is one tensor."""
        return {t: p.sources[0] for t, p in self.pieces.items() if p.convert is None}

    @property
    def covered(self) -> dict[str, Piece]:
        """Every name of the model that the source gives, with its piece."""
        return {target: piece for piece in self.pieces.values() for target in piece.targets}


def wire(model: nn.Module, names: Iterable[str]) -> Wiring:
    """Return how a Transformers model is made of tensors of these names.

    Transformers' renamings and conversions come first. What they leave over is matched by name up
    to a prefix that the checkpoint has and the model has not, or the other way round.

    Args:
        model: the model, with weights or without.
        names: names of the source's tensors.
    """
    keys = frozenset(model.state_dict())
    rename, converter_of = _rules(model, keys)
    found: dict[str, list[tuple[str, str | None]]] = {}
    unknown: list[str] = []
    for name in sorted(names, key=_natural):
        target, pattern = rename(name)
        if target not in keys or (target in found and pattern is None):
            unknown.append(name)
        else:
            found.setdefault(target, []).append((name, pattern))
    pieces: dict[str, Piece] = {}
    for target, parts in found.items():
        converter = converter_of(parts[0][1])
        sources = tuple(name for name, _ in parts)
        if converter is None:
            pieces[target] = Piece((target,), sources)
        else:
            made = _converted(model, target, tuple(parts), converter)
            pieces[target] = Piece(_targets(target, converter, keys), sources, made)
    covered = {target for piece in pieces.values() for target in piece.targets}
    near = map_names(sorted(keys - covered), unknown)
    pieces |= {target: Piece((target,), (name,)) for target, name in near.items()}
    left = tuple(name for name in unknown if name not in set(near.values()))
    return Wiring(pieces, left, frozenset(k for k in keys if rename(k)[0] == k))


def turned(model: nn.Module, wiring: Wiring) -> frozenset[str]:
    """Return the tensors of the source that a model keeps as [I, O]: weights of Conv1D layers."""
    found = (
        wiring.names.get(f"{name}.weight")
        for name, module in model.named_modules()
        if is_linear(module) and not isinstance(module, nn.Linear)
    )
    return frozenset(name for name in found if name is not None)


def read(
    pieces: Iterable[Piece], source: Source, dtype_of: Callable[[str], torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the model, tensor) of some pieces, floats in the type the model wants."""
    pieces = list(pieces)
    straight = {p.sources[0]: p.targets[0] for p in pieces if p.convert is None}
    for name, tensor in source.read(straight):
        yield straight[name], _cast(tensor, dtype_of(straight[name]))
    for piece in pieces:
        if piece.convert is not None:
            dtype = dtype_of(piece.targets[0])
            parts = {name: _cast(t, dtype) for name, t in source.read(piece.sources)}
            yield from piece.convert(parts).items()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _rules(
    model: nn.Module, keys: frozenset[str]
) -> tuple[Callable[[str], tuple[str, str | None]], Callable[[str | None], Any]]:
    """Return (name to model's name and converter's pattern, pattern to converter)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = dict.fromkeys(keys, True)  # rename_source_key asks for a value that is not None
    prefix = getattr(model, "base_model_prefix", "")

    def rename(name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in keys and name in keys:
            target, pattern = rename_source_key(name, [], [], prefix, known)
        return target, pattern

    return rename, lambda pattern: None if pattern is None else by_pattern[pattern]


def _converted(
    model: nn.Module, target: str, parts: tuple[tuple[str, str | None], ...], converter: Any
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fresh = copy.deepcopy(converter)
        for name, pattern in parts:
            fresh.add_tensor(target, name, pattern, tensors[name])
        made = fresh.convert(target, model=model, config=model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in made.items()}

    return convert


def _targets(target: str, converter: Any, keys: frozenset[str]) -> tuple[str, ...]:
    first, *others = converter.target_patterns
    return (target, *(n for o in others if (n := target.replace(first, o)) in keys))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that counts: expert 2 before expert 10."""
    parts = re.split(r"(\d+)", name)
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]
