"""Experts that a model holds fused in 3-D parameters and a checkpoint holds packed, one by one.

Such an experts module keeps its class's gating and norms, but gets a linear layer for every part of
every expert, under the names of the checkpoint. Nothing outside the model is changed: transformers
is asked not to fuse those keys while this model is loaded.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ar_kernels.hf.stored import StoredLayer

_PART = re.compile(r"(.+)\.(\d+)\.(\w+)\.weight")
_FUSING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
"""Operations of transformers that we can leave out: stack the experts, set gate above up."""


@dataclass(frozen=True)
class Part:
    """Where the weights of one name (`gate_proj`) of all experts go in a fused parameter.

    Attributes:
        parameter: name of the fused parameter in its module.
        place: which part of it along the output axis.
        places: how many parts it has.
    """

    parameter: str
    place: int
    places: int


@dataclass
class ExpertsInFiles:
    """One experts module: its parts by name, and what the files hold for each expert."""

    parts: dict[str, Part] = field(default_factory=dict)
    stored: dict[str, StoredLayer] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """True when the weight of some expert is packed."""
        return any(layer.packed for layer in self.stored.values())


@dataclass(frozen=True)
class Conversion:
    """What transformers would do with a key of the files.

    Attributes:
        name: the key after renaming, before fusing.
        target: the key of the parameter it is fused into.
        place: position among the keys that are joined.
        places: how many are joined.
        operations: names of the operations.
        sources: the patterns that identify the conversion.
    """

    name: str
    target: str
    place: int
    places: int
    operations: list[str]
    sources: tuple[str, ...]


def find_experts(
    stored: Mapping[str, StoredLayer], fusing: Callable[[str], Conversion | None]
) -> tuple[dict[str, ExpertsInFiles], set[tuple[str, ...]]]:
    """Return the experts modules to take apart, by name, and the conversions to leave out.

    Nothing when no expert is packed; all that a conversion fuses when one is.

    Args:
        stored: what the files hold, by the module's name in the files.
        fusing: what transformers would do with a key, None when it fuses nothing.

    Raises:
        KernelError: packed tensors belong to parameters that are fused in another way.
    """
    out: dict[str, ExpertsInFiles] = {}
    sources: dict[str, set[tuple[str, ...]]] = {}
    odd = []
    for layer in stored.values():
        found = fusing(f"{layer.name}.weight")
        if found is None:
            continue
        module, _, parameter = found.target.rpartition(".")
        hit = _PART.fullmatch(found.name)
        if hit is None or not _same(hit[1], module) or found.operations not in _FUSING:
            odd += [layer.name] if layer.packed else []
            continue
        here = out.setdefault(module, ExpertsInFiles())
        here.parts[hit[3]] = Part(parameter, found.place, found.places)
        here.stored[f"{module}.{hit[2]}.{hit[3]}"] = layer
        sources.setdefault(module, set()).add(found.sources)
    if odd:
        msg = (
            f"{len(odd)} quantized layers ({', '.join(odd[:3])}, ...) are parts of parameters that "
            "this model fuses in a way not known here. Dequantize the checkpoint or leave them in "
            "16 bit"
        )
        raise KernelError(msg)
    dropped = set().union(*(sources[m] for m, found in out.items() if found.packed), set())
    return {m: found for m, found in out.items() if sources[m] & dropped}, dropped


def _same(one: str, other: str) -> bool:
    """Tell whether two names mean the same module, one perhaps without the body's prefix."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def part_shapes(module: nn.Module, found: ExpertsInFiles, name: str) -> dict[str, tuple[int, int]]:
    """Return (rows, columns) of every part of every expert, by its name in the model.

    Raises:
        KernelError: the files lack experts, or the module holds its weights in another way.
    """
    if getattr(module, "is_transposed", False) or getattr(module, "has_bias", False):
        msg = f"{name}: experts with transposed weights or biases are opened in 16 bit only"
        raise KernelError(msg)
    shapes = {}
    for leaf, part in found.parts.items():
        count, rows, columns = getattr(module, part.parameter).shape
        for number in range(count):
            shapes[f"{name}.{number}.{leaf}"] = (rows // part.places, columns)
    lost = shapes.keys() - found.stored.keys()
    if lost:
        msg = f"the files lack {len(lost)} weights of experts: {', '.join(sorted(lost)[:3])}, ..."
        raise KernelError(msg)
    return shapes


def take_apart(
    module: nn.Module, found: ExpertsInFiles, make: Callable[[str], nn.Module], name: str
) -> None:
    """Give an experts module a layer for every part of every expert in place of its parameters.

    Args:
        module: the experts module, on the meta device.
        found: what the files hold for it.
        make: the layer to a name.
        name: of the module in the model.
    """
    count = 0
    for parameter in {part.parameter for part in found.parts.values()}:
        count = getattr(module, parameter).shape[0]
        delattr(module, parameter)
    for number in range(count):
        expert = nn.Module()
        for leaf in found.parts:
            expert.add_module(leaf, make(f"{name}.{number}.{leaf}"))
        module.add_module(str(number), expert)
    up = [leaf for leaf, part in _by_place(found) if part.parameter != "down_proj"]
    down = [leaf for leaf, part in _by_place(found) if part.parameter == "down_proj"]
    if len(down) != 1 or not up:
        msg = f"{name}: experts made of {', '.join(found.parts)} are not known here"
        raise KernelError(msg)
    kind: Any = type(module)
    module.__class__ = _packed_class(kind)
    module._up, module._down = tuple(up), down[0]  # type: ignore[assignment]  # noqa: SLF001
    module._is_hf_initialized = True  # type: ignore[assignment]  # noqa: SLF001


def _by_place(found: ExpertsInFiles) -> Iterable[tuple[str, Part]]:
    return sorted(found.parts.items(), key=lambda item: item[1].place)


class PackedExperts(nn.Module):
    """Mixin for an experts class of transformers: one linear layer per part of each expert."""

    _up: tuple[str, ...]
    _down: str
    # of the class it is mixed into
    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_: Any
    ) -> Tensor:
        """Return the experts' outputs [T, I], weighted and summed over the chosen ones.

        Args:
            hidden_states: [T, I].
            top_k_index: numbers of the chosen experts [T, k]; numbers beyond the last choose none.
            top_k_weights: their weights [T, k].
        """
        out = torch.zeros_like(hidden_states)
        chosen = top_k_index.unique().tolist()
        for number in chosen:
            expert = self._modules.get(str(number))
            if expert is None:
                continue
            token, slot = torch.where(top_k_index == number)
            given = hidden_states[token]
            inner = torch.cat([expert.get_submodule(leaf)(given) for leaf in self._up], -1)
            gated = getattr(self, "has_gate", True)
            inner = self._apply_gate(inner) if gated else self.act_fn(inner)
            made = expert.get_submodule(self._down)(inner)
            if getattr(self, "has_post_expert_norm", False):
                made = self.post_expert_norm(made)
            made = made * top_k_weights[token, slot, None]
            out.index_add_(0, token, made.to(out.dtype))
        return out


@functools.cache
def _packed_class(kind: Any) -> Any:
    return type(f"Packed{kind.__name__}", (PackedExperts, kind), {})
