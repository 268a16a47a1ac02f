"""Experts that a model holds fused in 3-D parameters and a checkpoint holds packed, one by one.

Such an experts module keeps its class's gating and norms, but gets a linear layer for every part of
every expert, under the names of the checkpoint. Nothing outside the model is changed: transformers
is asked not to fuse those keys while this model is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from ar_kernels.hf.fused import JOINED, fused_parts
from ar_kernels.hf.packed_experts import DOWN, UP, knows, pack
from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from ar_kernels.hf.stored import StoredLayer
    from ar_kernels.hf.trials import Placed

_PART = re.compile(r"(.+)\.(\d+)\.(\w+)\.weight")
_BESIDE = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)")
_STACKED = 3
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
    """One experts module: its parts by name, and what the files hold for each expert.

    Attributes:
        parts: where each part of an expert is in the parameters, by the part's name.
        stored: what the files hold, by module, number and part (`mlp.experts.3.gate_proj`).
        homes: name that the model is to have for an expert, by its number, where the files count
            or name experts otherwise than the model does.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    stored: dict[str, StoredLayer] = field(default_factory=dict)
    homes: dict[int, str] = field(default_factory=dict)

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
    stored: Mapping[str, StoredLayer],
    fusing: Callable[[str], Conversion | None],
    trial: Callable[[Sequence[str]], Mapping[str, Placed]],
) -> tuple[dict[str, ExpertsInFiles], set[tuple[str, ...]]]:
    """Return the experts modules to take apart, by name, and the conversions to leave out.

    Nothing when no expert is packed; all that a conversion fuses when one is.

    Args:
        stored: what the files hold, by the module's name in the files.
        fusing: what transformers would do with a key, None when it fuses nothing.
        trial: where keys that are fused in another way than by stacking come to lie.

    Raises:
        KernelError: packed tensors belong to parameters that are fused in another way.
    """
    out: dict[str, ExpertsInFiles] = {}
    sources: dict[str, set[tuple[str, ...]]] = {}
    odd: dict[str, tuple[StoredLayer, Conversion]] = {}
    for layer in stored.values():
        found = fusing(f"{layer.name}.weight")
        if found is None:
            continue
        module, _, parameter = found.target.rpartition(".")
        hit = _PART.fullmatch(found.name)
        if hit is None or not _same(hit[1], module) or found.operations not in _FUSING:
            odd[f"{layer.name}.weight"] = layer, found
            continue
        here = out.setdefault(module, ExpertsInFiles())
        here.parts[hit[3]] = Part(parameter, found.place, found.places)
        here.stored[f"{module}.{hit[2]}.{hit[3]}"] = layer
        sources.setdefault(module, set()).add(found.sources)
    if any(layer.packed for layer, _ in odd.values()):
        placed = trial(list(odd))
        _check_placed(odd, placed)
        for key, where in placed.items():
            layer, found = odd[key]
            hit = _PART.fullmatch(found.name)
            module, _, parameter = where.target.rpartition(".")
            if hit is not None:
                here = out.setdefault(module, ExpertsInFiles())
                here.parts[hit[3]] = Part(parameter, where.place, where.places)
                here.stored[f"{module}.{where.expert}.{hit[3]}"] = layer
                here.homes[where.expert] = f"{hit[1]}.{hit[2]}"
                sources.setdefault(module, set()).add(found.sources)
    dropped = set().union(*(sources[m] for m, found in out.items() if found.packed), set())
    return {m: found for m, found in out.items() if sources[m] & dropped}, dropped


def _check_placed(
    odd: Mapping[str, tuple[StoredLayer, Conversion]], placed: Mapping[str, Placed]
) -> None:
    lost = [layer.name for key, (layer, _) in odd.items() if layer.packed and key not in placed]
    if lost:
        msg = (
            f"{len(lost)} quantized layers ({', '.join(lost[:3])}, ...) are parts of parameters "
            "that this model fuses in a way not known here. Dequantize the checkpoint or leave "
            "them in 16 bit"
        )
        raise KernelError(msg)


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


def find_apart(
    model: nn.Module,
    files: Mapping[str, StoredLayer],
    rename: Callable[[str], str],
    fusing: Callable[[str], Conversion | None],
    known: Container[str],
) -> dict[str, ExpertsInFiles]:
    """Return experts packed one by one whose own files hold a stack for each part, by module.

    Such a file has `moe.gate_proj.weight` for all experts (step3p7); single ones stand below
    `experts` beside it, where no rule of Transformers' finds them.

    Args:
        model: the model, on the meta device.
        files: what the files hold, by the module's name there.
        rename: a key of the model for a key of the files.
        fusing: what transformers would do with a key, None when it fuses nothing.
        known: experts modules that are found already.
    """
    out: dict[str, ExpertsInFiles] = {}
    parameters = dict(model.named_parameters())
    for layer in files.values():
        hit = _BESIDE.fullmatch(layer.name)
        if hit is None:
            continue
        whole = f"{hit[1]}.{hit[3]}.weight"
        found = fusing(whole)
        target = rename(whole) if found is None else found.target
        module, _, leaf = target.rpartition(".")
        if target not in parameters or module in known or parameters[target].ndim != _STACKED:
            continue
        here = out.setdefault(module, ExpertsInFiles())
        place, places = (0, 1) if found is None else (found.place, found.places)
        here.parts[hit[3]] = Part(leaf, place, places)
        here.stored[f"{module}.{hit[2]}.{hit[3]}"] = layer
        home = rename(f"{layer.name}.weight").removesuffix(f".{hit[3]}.weight")
        here.homes[int(hit[2])] = home
    return {module: found for module, found in out.items() if found.packed}


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
    computed = len(getattr(module, DOWN, ()))  # those beyond compute nothing (longcat)
    for leaf, part in found.parts.items():
        count, rows, columns = getattr(module, part.parameter).shape
        if transposed:
            rows, columns = columns, rows
        for number in range(count):
            key = f"{name}.{number}.{leaf}"
            if number < computed or key in found.stored:
                shapes[key] = (rows // part.places, columns)
    lost = shapes.keys() - found.stored.keys()
    if lost:
        msg = f"the files lack {len(lost)} weights of experts: {', '.join(sorted(lost)[:3])}, ..."
        raise KernelError(msg)
    return shapes


def take_apart(
    model: nn.Module, name: str, found: ExpertsInFiles, make: Callable[[str], nn.Module]
) -> None:
    """Give an experts module a layer for every part of every expert in place of its parameters.

    Args:
        model: the model, on the meta device.
        name: of the experts module in it.
        found: what the files hold for it.
        make: the layer to a name.

    Raises:
        KernelError: experts that are made of other parts, or compute in a way of their own.
    """
    module = model.get_submodule(name)
    require_known(module, found, name)
    drop_parameters(module, found)
    furnish(module, found, name, make)
    for number, home in found.homes.items():
        expert = module.get_submodule(str(number))
        delattr(module, str(number))
        path, _, leaf = home.rpartition(".")
        _made(model, path).add_module(leaf, expert)


def _made(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path, made of empty ones where there is none."""
    for part in path.split("."):
        if part not in dict(model.named_children()):
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    return model


def require_known(module: nn.Module, found: ExpertsInFiles, name: str) -> None:
    """Raise KernelError where it is not known how an experts module computes."""
    up, down = _leaves(found)
    if len(down) != 1 or not up:
        msg = f"{name}: experts made of {', '.join(found.parts)} are not known here"
        raise KernelError(msg)
    if not knows(module):
        msg = f"{name}: how {type(module).__name__} joins gate and up is not known here"
        raise KernelError(msg)


def drop_parameters(module: nn.Module, found: ExpertsInFiles) -> None:
    """Take the fused parameters from an experts module."""
    for parameter in {part.parameter for part in found.parts.values()}:
        delattr(module, parameter)


def furnish(
    module: nn.Module, found: ExpertsInFiles, name: str, make: Callable[[str], nn.Module]
) -> None:
    """Give an experts module a layer for every part of every expert, and the class to run them.

    `name` is the module's in the model.
    """
    experts = []
    for number in range(1 + max(int(key.split(".")[-2]) for key in found.stored)):
        expert = nn.Module()
        for leaf in found.parts:
            key = f"{name}.{number}.{leaf}"
            if key in found.stored:
                expert.add_module(leaf, make(key))
        module.add_module(str(number), expert)
        experts.append(expert)
    up, down = _leaves(found)
    parameters = {found.parts[leaf].parameter for leaf in up}
    together = parameters.pop() if len(parameters) == 1 else UP
    pack(module, experts, (up, down[0]), together)
    module._is_hf_initialized = True  # type: ignore[assignment]  # noqa: SLF001


def _leaves(found: ExpertsInFiles) -> tuple[list[str], list[str]]:
    """Return the names of what is computed first, in order, and of what comes after the gate."""
    ranked = sorted(found.parts.items(), key=lambda item: item[1].place)
    return (
        [leaf for leaf, part in ranked if part.parameter != DOWN],
        [leaf for leaf, part in ranked if part.parameter == DOWN],
    )
