"""Where Transformers' conversions put the matrices of single experts: told by trying.

A conversion is run on tiny numbered matrices; where the numbers come out tells which one is which
part of which expert. So experts that files count otherwise than the model does are found, whatever
the operation is called (ernie4_5_vl_moe: those for text and for images in one list).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

_TINY = (2, 3)
"""Shape of the matrices that a conversion is tried on."""
_MANY = 3


@dataclass(frozen=True)
class Placed:
    """Where a matrix of one expert goes.

    Attributes:
        target: name of the parameter.
        expert: number of the expert in it.
        place: which part of the expert's rows.
        places: how many parts those have.
    """

    target: str
    expert: int
    place: int
    places: int


def places_of(
    keys: Sequence[str], convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> dict[str, Placed]:
    """Return where a conversion puts each of its sources; nothing where that cannot be told.

    Every source has to be one part of one expert, and every place to be filled.

    Args:
        keys: names of the sources.
        convert: makes parameters by name of matrices by name.
    """
    size = _TINY[0] * _TINY[1]
    order = sorted(keys, key=_natural)
    numbered = torch.arange(len(order) * size, dtype=torch.float32, device="cpu")
    tiny = dict(zip(order, numbered.reshape(-1, *_TINY).unbind(), strict=True))
    try:
        made = convert(tiny)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return {}  # whatever it minds about tiny tensors, it is then not told by them
    out: dict[str, Placed] = {}
    for target, whole in made.items():
        if whole.ndim != _MANY or whole.shape[2] != _TINY[1] or whole.shape[1] % _TINY[0]:
            return {}
        parts = whole.shape[1] // _TINY[0]
        for expert, rows in enumerate(whole):
            for place, matrix in enumerate(rows.split(_TINY[0])):
                number = int(matrix[0, 0]) // size
                source = order[number] if number < len(order) else ""
                if source in out or not torch.equal(matrix, tiny.get(source, whole)):
                    return {}
                out[source] = Placed(target, expert, place, parts)
    return out if out.keys() == tiny.keys() else {}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that counts: expert 2 before expert 10."""
    parts = re.split(r"(\d+)", name)
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]
