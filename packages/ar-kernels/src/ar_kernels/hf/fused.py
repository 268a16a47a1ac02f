"""Where the projections of experts are in the parameters that a model holds them in, fused.

For checkpoints without names of single experts (theirs are fused too): when such a model is
quantized, its experts are written one by one as `N.gate_proj`, `N.up_proj`, `N.down_proj` below the
name of the experts, as engines read them. What Transformers notes on a module tells the layout,
else the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

JOINED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""Name of a fused parameter to the projections in it, in the order of its rows."""
_MANY = 3


@dataclass(frozen=True)
class FusedPart:
    """One projection of all experts.

    Attributes:
        parameter: name of the parameter in its module, [E, O', I] or, `transposed`, [E, I, O'].
        transposed: the matrices are stored as [I, O'].
        rows: (first, end, step) of its rows among O'; None: all.
    """

    parameter: str
    transposed: bool
    rows: tuple[int, int, int] | None

    def view(self, stored: Tensor) -> Tensor:
        """Return the projection of all experts [E, O, I] in a parameter, as a view of it."""
        whole = stored.transpose(1, 2) if self.transposed else stored
        return whole if self.rows is None else whole[:, slice(*self.rows)]


def fused_parts(module: nn.Module) -> dict[str, FusedPart] | str:
    """Return the projections of an experts module by name, or why they cannot be told.

    A parameter of another name is left out.
    """
    held = {
        leaf: parameter
        for leaf, parameter in module.named_parameters(recurse=False)
        if leaf in JOINED and parameter.ndim == _MANY
    }
    transposed = _transposed(module, held)
    if transposed is None:
        shapes = ", ".join(f"{leaf} {list(p.shape)}" for leaf, p in held.items())
        return f"cannot tell rows from columns ({shapes})"
    apart = not getattr(module, "is_concatenated", True)
    out = {}
    for leaf, parameter in held.items():
        names, rows = JOINED[leaf], parameter.shape[2 if transposed else 1]
        if rows % len(names):
            return f"{leaf} has {rows} rows, which are no {len(names)} equal projections"
        for i, name in enumerate(names):
            out[name] = FusedPart(leaf, transposed, rows_of(i, len(names), rows, apart=apart))
    return out


def joined_experts(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return float tensors by name with those of single experts put into the model's parameters.

    Only whole parameters are made, of experts named as `fused_parts` has it.

    Args:
        tensors: weights by name; those that are joined are taken out of it.
        model: the model, with weights or without.
    """
    for name, module in model.named_modules():
        kinds = fused_parts(module)
        if isinstance(kinds, str):
            continue
        for leaf in dict.fromkeys(part.parameter for part in kinds.values()):
            mine = {kind: part for kind, part in kinds.items() if part.parameter == leaf}
            stored = module.get_parameter(leaf)
            keys = {k: [f"{name}.{e}.{k}.weight" for e in range(len(stored))] for k in mine}
            if not all(key in tensors for found in keys.values() for key in found):
                continue
            like = tensors[next(iter(keys.values()))[0]]
            made = torch.empty(stored.shape, dtype=like.dtype, device=like.device)
            for kind, part in mine.items():
                part.view(made).copy_(torch.stack([tensors.pop(key) for key in keys[kind]]))
            tensors[f"{name}.{leaf}"] = made
    return tensors


def rows_of(index: int, count: int, rows: int, *, apart: bool) -> tuple[int, int, int] | None:
    """Return (first, end, step) of the rows of one of `count` projections; None: all.

    `apart`: they take turns, row by row; else they are one below the other.
    """
    if count == 1:
        return None
    if apart:
        return index, rows, count
    size = rows // count
    return index * size, (index + 1) * size, 1


def _transposed(module: nn.Module, held: dict[str, torch.nn.Parameter]) -> bool | None:
    """Tell whether experts are stored as [E, I, O]: as noted, or as gate, up and down fit."""
    noted = getattr(module, "is_transposed", None)
    if isinstance(noted, bool):
        return noted
    if not held.keys() >= {"gate_up_proj", "down_proj"}:
        return None
    first, second = (tuple(held[leaf].shape) for leaf in ("gate_up_proj", "down_proj"))
    if first[1] == 2 * second[2] and first[2] == second[1]:
        return False
    if first[2] == 2 * second[1] and first[1] == second[2]:
        return True
    return None
