"""The experts of a block: where each one's matrices are, and what they are called in files.

Names come from the checkpoint: Transformers' own conversion is run on tiny numbered tensors, and
where the numbers come out tells which file tensor is which part of which parameter. Checkpoints
that hold experts fused have no names for single ones; engines then expect `N.gate_proj`,
`N.up_proj`, `N.down_proj` below the experts' own name, and the layout is told by what Transformers
notes on the module, or by the shapes.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ar_kernels.hf.fused import JOINED, fused_parts, rows_of
from ar_schemes import LayerInfo
from ar_tuner.parts import WeightRef

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from ar_tuner.wiring import Piece, Wiring

_JOINED = "experts one below the other in one matrix: stay in 16 bit"
_TINY = (2, 3)
"""Shape of the matrices that conversions are tried on."""
_MANY = 3
"""Dimensions of a parameter that holds one matrix for each expert."""


@dataclass(frozen=True)
class Experts:
    """What a block holds beside its linear layers.

    Attributes:
        parts: matrices of experts that can be quantized.
        kept: routers and fused experts of an unknown layout: no layer of ours, but reported.
    """

    parts: tuple[WeightRef, ...] = ()
    kept: tuple[tuple[str, LayerInfo], ...] = ()

    def of(self, module: str, block: nn.Module, name: str) -> Iterator[LayerInfo]:
        """Yield the layers that a module of the block (by its name in it) holds.

        Args:
            module: name of the module in the block.
            block: the block.
            name: name of the block in the model.
        """
        for ref in self.parts:
            if ref.module == module:
                rows, columns = ref.view(block.get_parameter(ref.parameter)).shape
                yield LayerInfo(ref.layer, rows, columns, name, role="experts")
        yield from (info for place, info in self.kept if place == module)


@dataclass
class _Found:
    parts: list[WeightRef] = field(default_factory=list)
    kept: list[tuple[str, LayerInfo]] = field(default_factory=list)


def find_experts(block: nn.Module, name: str, wiring: Wiring) -> Experts:
    """Return the experts and routers of a block.

    Args:
        block: the block.
        name: its name in the model.
        wiring: how the model is made of the tensors of files.
    """
    found = _Found()
    covered = wiring.covered
    for path, module in block.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            inside = f"{path}.{leaf}".strip(".")
            full = f"{name}.{inside}"
            if is_fused(inside, module, parameter):
                refs = _parts(module, inside, parameter, covered.get(full), full)
                if isinstance(refs, str):
                    copies, rows, columns = parameter.shape
                    info = LayerInfo(
                        full, rows, columns, name, role="experts", copies=copies, keep=refs
                    )
                    found.kept.append((path, info))
                else:
                    found.parts += refs
            elif _is_joined(inside, module, parameter):
                rows, columns = parameter.shape
                info = LayerInfo(full, rows, columns, name, role="experts", keep=_JOINED)
                found.kept.append((path, info))
            elif _is_bare_router(module, leaf, parameter):
                rows, columns = parameter.shape
                stored = wiring.names.get(full, full)
                layer = stored.removesuffix(".weight")
                found.kept.append((path, LayerInfo(layer, rows, columns, name, role="router")))
    return Experts(tuple(found.parts), tuple(found.kept))


def holds_experts(block: nn.Module) -> bool:
    """Tell whether a block holds experts that no layer stands for."""
    return any(
        is_fused(f"{path}.{leaf}", module, parameter)
        or _is_joined(f"{path}.{leaf}", module, parameter)
        for path, module in block.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
    )


def is_fused(name: str, module: nn.Module, parameter: Tensor) -> bool:
    """Tell whether a parameter (by its name in the block) holds a matrix for each expert."""
    words = f"{name} {type(module).__name__}".lower()
    return parameter.ndim == _MANY and "expert" in words


def _is_joined(name: str, module: nn.Module, parameter: Tensor) -> bool:
    """Tell whether a parameter holds all experts one below the other (dbrx)."""
    words = f"{name} {type(module).__name__}".lower()
    bare = parameter.ndim == 2 and not _is_linear(module)  # noqa: PLR2004
    return bare and "expert" in words and not re.search(r"bias|norm|router|gate$", name)


def _is_linear(module: nn.Module) -> bool:
    return any(c.__name__ in ("Linear", "Conv1D") for c in type(module).__mro__)


def _is_bare_router(module: nn.Module, leaf: str, parameter: Tensor) -> bool:
    kind = type(module).__name__.lower()
    named = "router" in kind or kind.endswith("gate")
    return leaf == "weight" and parameter.ndim == 2 and named and not _is_linear(module)  # noqa: PLR2004


def _parts(
    module: nn.Module, inside: str, parameter: Tensor, piece: Piece | None, full: str
) -> list[WeightRef] | str:
    """Return the matrices in a fused parameter, or why they stay as they are."""
    if piece is not None and piece.convert is not None:
        for stacked in (False, True):
            found = _by_conversion(inside, parameter, piece, full, stacked=stacked)
            if found is not None:
                return found
        if len(piece.sources) > 1:
            return f"fused experts made of {len(piece.sources)} tensors in an unknown way"
    leaf = inside.rpartition(".")[2]
    if leaf not in JOINED:
        return f"fused experts of an unknown layout ({leaf} {list(parameter.shape)})"
    kinds = fused_parts(module)
    if isinstance(kinds, str):
        return f"fused experts of an unknown layout: {kinds}"
    stored = piece.sources[0] if piece is not None and len(piece.sources) == 1 else full
    prefix = stored.removesuffix(".weight").rpartition(".")[0]
    if "expert" not in prefix.rpartition(".")[2]:  # granitemoe: a linear layer of the whole
        prefix += ".experts"
    return [
        WeightRef(
            f"{prefix}.{expert}.{kind}",
            inside,
            transposed=part.transposed,
            expert=expert,
            rows=part.rows,
        )
        for expert in range(parameter.shape[0])
        for kind, part in kinds.items()
        if part.parameter == leaf
    ]


def _by_conversion(
    inside: str, parameter: Tensor, piece: Piece, full: str, *, stacked: bool
) -> list[WeightRef] | None:
    """Return the parts by what the conversion makes of tiny tensors, or None if it cannot be told.

    Every source has to be one matrix of one expert (`stacked`: of all experts, one matrix each),
    and every place of the parameter filled.
    """
    assert piece.convert is not None
    size, many = _TINY[0] * _TINY[1], parameter.shape[0] if stacked else 1
    numbered = torch.arange(len(piece.sources) * many * size).float().reshape(-1, *_TINY)
    stacks = numbered.unflatten(0, (-1, many)) if stacked else numbered
    tiny = dict(zip(piece.sources, stacks.unbind(), strict=True))
    made = None
    # whatever a conversion minds about tiny tensors, it is then not told by them
    with contextlib.suppress(RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        made = piece.convert(tiny).get(full)
    if made is None or made.ndim != _MANY or made.shape[0] != parameter.shape[0]:
        return None
    turned = made.shape[1] == _TINY[1]
    tall = made.transpose(1, 2) if turned else made
    if tall.shape[2] != _TINY[1] or tall.shape[1] % _TINY[0]:
        return None
    out = []
    origin, count = (tall // size).long(), tall.shape[1] // _TINY[0]
    rows = parameter.shape[2 if turned else 1]
    for i, matrix in enumerate(numbered):
        source = piece.sources[i // many]
        where = (origin == i).all(-1).nonzero()  # (expert, row)
        if len(where) != _TINY[0] or not source.endswith(".weight"):
            continue  # of another target of the same conversion
        expert, first = where[0].tolist()
        apart = int(where[1][1]) - first != 1
        if not torch.equal(tall[expert, where[:, 1]], matrix):
            return None
        index = first if apart else first // _TINY[0]
        place = rows_of(index, count, rows, apart=apart)
        layer = source.removesuffix(".weight")
        if stacked:
            prefix, _, kind = layer.rpartition(".")
            layer = f"{prefix}.experts.{i % many}.{kind}"
        out.append(WeightRef(layer, inside, transposed=turned, expert=expert, rows=place))
    complete = len(out) == parameter.shape[0] * count
    return sorted(out, key=lambda ref: (ref.expert, ref.rows or ())) if complete else None


def own_wiring(model: nn.Module) -> Wiring:
    """Return how a model in memory would be made of the files that it would be saved in."""
    from ar_tuner.wiring import Piece, Wiring, wire

    hollow = {k: torch.empty_like(v, device="meta") for k, v in model.state_dict().items()}
    if not _is_from_transformers(model):
        return Wiring({k: Piece((k,), (k,)) for k in hollow}, (), frozenset(hollow))
    return wire(model, as_in_files(model, hollow))


def as_in_files(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a model as `save_pretrained` would write them: names, experts apart."""
    if not _is_from_transformers(model):
        return state
    from transformers.core_model_loading import revert_weight_conversion

    made: dict[str, Tensor] = revert_weight_conversion(model, state)
    return made


def _is_from_transformers(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)
