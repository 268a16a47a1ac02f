"""Experts that a model holds fused in 3-D parameters and a checkpoint holds packed, one by one.

Such an experts module keeps its class's gating and norms, but gets a linear layer for every part of
every expert, under the names of the checkpoint. Nothing outside the model is changed: transformers
is asked not to fuse those keys while this model is loaded.
"""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ar_kernels.expert_ops import expert_linear
from ar_kernels.hf.fused import JOINED, fused_parts
from ar_kernels.linear import QuantLinear
from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping

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


DOWN = "down_proj"


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


def find_named(
    model: nn.Module, stored: Mapping[str, StoredLayer], known: Container[str]
) -> dict[str, ExpertsInFiles]:
    """Return experts packed one by one in models whose own files hold them fused, by module.

    Transformers has no rule for these; their names are those of `fused_parts`.

    Args:
        model: the model, on the meta device.
        stored: what the files hold, by the module's name in the model.
        known: experts modules that are found already.
    """
    out: dict[str, ExpertsInFiles] = {}
    for name, module in model.named_modules():
        kinds = fused_parts(module)
        if name in known or isinstance(kinds, str):
            continue
        found = ExpertsInFiles()
        for kind, part in kinds.items():
            together = JOINED[part.parameter]
            for number in range(len(module.get_parameter(part.parameter))):
                key = f"{name}.{number}.{kind}"
                if key in stored:
                    found.stored[key] = stored[key]
                    found.parts[kind] = Part(part.parameter, together.index(kind), len(together))
        if found.packed:
            out[name] = found
    return out


def _same(one: str, other: str) -> bool:
    """Tell whether two names mean the same module, one perhaps without the body's prefix."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def part_shapes(module: nn.Module, found: ExpertsInFiles, name: str) -> dict[str, tuple[int, int]]:
    """Return (rows, columns) of every part of every expert, by its name in the model.

    Raises:
        KernelError: the files lack experts.
    """
    kinds = fused_parts(module)
    turned = not isinstance(kinds, str) and any(part.transposed for part in kinds.values())
    transposed = bool(getattr(module, "is_transposed", turned))
    shapes = {}
    for leaf, part in found.parts.items():
        count, rows, columns = getattr(module, part.parameter).shape
        if transposed:
            rows, columns = columns, rows
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

    Raises:
        KernelError: experts that are made of other parts, or compute in a way of their own.
    """
    require_known(module, found, name)
    count = drop_parameters(module, found)
    furnish(module, found, [f"{name}.{number}" for number in range(count)], make)


def require_known(module: nn.Module, found: ExpertsInFiles, name: str) -> None:
    """Raise KernelError where it is not known how an experts module computes."""
    up, down = _leaves(found)
    if len(down) != 1 or not up:
        msg = f"{name}: experts made of {', '.join(found.parts)} are not known here"
        raise KernelError(msg)
    gated = hasattr(module, "_apply_gate") or not getattr(module, "has_gate", True)
    if not gated and not _takes_sorted(type(module)):
        msg = f"{name}: how {type(module).__name__} joins gate and up is not known here"
        raise KernelError(msg)


def drop_parameters(module: nn.Module, found: ExpertsInFiles) -> int:
    """Take the fused parameters from an experts module and return for how many experts they are."""
    count = 0
    for parameter in {part.parameter for part in found.parts.values()}:
        count = getattr(module, parameter).shape[0]
        delattr(module, parameter)
    return count


def furnish(
    module: nn.Module, found: ExpertsInFiles, experts: list[str], make: Callable[[str], nn.Module]
) -> None:
    """Give an experts module a layer for every part of every expert, and the class to run them.

    `experts` are the experts' names in the model.
    """
    for number, one in enumerate(experts):
        expert = nn.Module()
        for leaf in found.parts:
            expert.add_module(leaf, make(f"{one}.{leaf}"))
        module.add_module(str(number), expert)
    up, down = _leaves(found)
    kind: Any = type(module)
    module.__class__ = _packed_class(kind, _takes_sorted(kind))
    module._up, module._down = tuple(up), down[0]  # type: ignore[assignment]  # noqa: SLF001
    parameters = {found.parts[leaf].parameter for leaf in up}
    together = parameters.pop() if len(parameters) == 1 else "gate_up_proj"
    module._up_parameter = together  # type: ignore[assignment]  # noqa: SLF001
    module._is_hf_initialized = True  # type: ignore[assignment]  # noqa: SLF001


def _leaves(found: ExpertsInFiles) -> tuple[list[str], list[str]]:
    """Return the names of what is computed first, in order, and of what comes after the gate."""
    ranked = sorted(found.parts.items(), key=lambda item: item[1].place)
    return (
        [leaf for leaf, part in ranked if part.parameter != DOWN],
        [leaf for leaf, part in ranked if part.parameter == DOWN],
    )


def _takes_sorted(kind: Any) -> bool:
    """Tell whether experts are given all tokens for each of them, and nothing else."""
    return len(inspect.signature(kind.forward).parameters) == 2  # noqa: PLR2004 - itself, tokens


class _Packed(nn.Module):
    """What experts with a linear layer per part have in common."""

    _up: tuple[str, ...]
    _up_parameter: str
    _down: str
    # of the class it is mixed into
    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]

    def _run(self, given: Tensor, expert: Tensor) -> Tensor:
        """Return what each token's expert gives, [T, I], for tokens [T, I] and experts int64 [T].

        Numbers beyond the last expert give something that means nothing.
        """
        count = self._count()
        made = self._inner([self._part(leaf, given, expert) for leaf in self._up], expert, count)
        return self._part(self._down, made, expert) + self._bias(DOWN, expert, count)

    def _count(self) -> int:
        return sum(name.isdigit() for name in self._modules)

    def _part(self, leaf: str, given: Tensor, expert: Tensor) -> Tensor:
        """Return the products of tokens with one part of their experts, [T, O]."""
        layers = [self.get_submodule(f"{number}.{leaf}") for number in range(self._count())]
        first = layers[0]
        ready = [layer.ready() if isinstance(layer, QuantLinear) else None for layer in layers]
        here = [one for one in ready if one is not None]
        alike = len(here) == len(layers) and all(one[1:] == here[0][1:] for one in here)
        if not alike or not isinstance(first, QuantLinear):
            return _one_by_one(layers, given, expert)
        buffers = [tensor for one in here for tensor in one[0]]
        out = expert_linear(given.to(first.dtype), expert, buffers, *here[0][1:], first.rows)
        return out.to(given.dtype)

    def _inner(self, parts: list[Tensor], expert: Tensor, count: int) -> Tensor:
        """Return what the down projections are given, for the products of the other parts."""
        apart = len(parts) > 1 and not getattr(self, "is_concatenated", True)
        inner = torch.stack(parts, -1).flatten(-2) if apart else torch.cat(parts, -1)
        inner = inner + self._bias(self._up_parameter, expert, count)
        if not getattr(self, "has_gate", True):
            return self.act_fn(inner)
        if hasattr(self, "_apply_gate"):
            return self._apply_gate(inner)
        gate, up = inner.chunk(2, -1)
        return up * self.act_fn(gate)

    def _bias(self, parameter: str, expert: Tensor, count: int) -> Tensor | float:
        held = self._parameters.get(f"{parameter}_bias")
        return 0.0 if held is None else held[expert.clamp(max=count - 1)]


def _one_by_one(layers: list[nn.Module], given: Tensor, expert: Tensor) -> Tensor:
    """Return the products with experts stored in different ways, or with inputs of their own."""
    made = given.new_zeros(given.shape[0], int(getattr(layers[0], "out_features", 0)))
    for number in expert.unique().tolist():
        if number < len(layers):
            mine = expert == number
            made[mine] = layers[number](given[mine]).to(made.dtype)
    return made


class PackedExperts(_Packed):
    """Mixin for an experts class of transformers: one linear layer per part of each expert."""

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
        tokens, many = top_k_index.shape
        expert = top_k_index.reshape(-1)
        made = self._run(hidden_states.repeat_interleave(many, 0), expert)
        if getattr(self, "has_post_expert_norm", False):
            made = self.post_expert_norm(made)
        weights = top_k_weights.masked_fill(top_k_index >= self._count(), 0)
        made = made * weights.reshape(-1, 1)
        return made.to(hidden_states.dtype).view(tokens, many, -1).sum(1)


class PackedSortedExperts(_Packed):
    """The same for experts that are given every token once for each of them (llama4).

    Tokens that are not an expert's come as zeros, and are not computed.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the experts' outputs [E * T, I], for tokens [E * T, I] sorted by expert."""
        count = self._count()
        number = torch.arange(count, device=hidden_states.device)
        idle = hidden_states.eq(0).all(-1)
        expert = number.repeat_interleave(len(hidden_states) // count).masked_fill(idle, count)
        return self._run(hidden_states, expert).masked_fill(idle[:, None], 0)


@functools.cache
def _packed_class(kind: Any, takes_sorted: bool) -> Any:
    packed = PackedSortedExperts if takes_sorted else PackedExperts
    return type(f"Packed{kind.__name__}", (packed, kind), {})
