"""Experts that a checkpoint holds packed in one tensor for all of them: `gate_up_proj_blocks`.

The files of gpt-oss hold, for each fused parameter, the codes [E, O, G, 16] and the scales
[E, O, G] of groups of 32. While transformers loads, the experts module holds just these; then every
expert gets a layer per parameter, whose rows stay as they are (gate and up take turns), and the
stacked tensors are let go. A state dict has them again, under their names, and takes them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels.hf.experts import ExpertsInFiles, Part, drop_parameters, furnish, require_known
from ar_kernels.hf.fused import fused_parts
from ar_kernels.hf.stored import StoredLayer
from ar_kernels.layouts.base import TensorFact
from ar_kernels.linear import QuantLinear
from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

SUFFIXES = {"_blocks": "weight_packed", "_scales": "weight_scale"}
"""End of the name of a stacked tensor to the tensor of one expert's layer."""
_BYTES = 16
"""Bytes of the codes of one group of 32."""


@dataclass(frozen=True)
class Stack:
    """One experts module whose tensors are stacked: what is in the files, how its layers are made.

    Attributes:
        name: of the module in the model.
        found: its parts: one per parameter.
        tensors: name of a stacked tensor in the module to its shape in the files.
    """

    name: str
    found: ExpertsInFiles
    tensors: Mapping[str, tuple[int, ...]]


def find_stacks(model: nn.Module, stored: Mapping[str, StoredLayer]) -> dict[str, Stack]:
    """Return the experts modules whose parameters the files hold stacked and packed, by name.

    Args:
        model: the model, on the meta device.
        stored: what the files hold, by the module's name in the model.

    Raises:
        KernelError: the files hold another number of experts than the model, or part of them.
    """
    out = {}
    for name, module in model.named_modules():
        held = stored.get(name)
        kinds = fused_parts(module)
        if held is None or isinstance(kinds, str):
            continue
        leaves = dict.fromkeys(part.parameter for part in kinds.values())
        here = [leaf for leaf in leaves if leaf + "_blocks" in held.facts]
        if not here:
            continue
        if len(here) != len(leaves):
            msg = f"{name}: the files hold {', '.join(here)} packed, and the others not"
            raise KernelError(msg)
        out[name] = _stack(name, module, held, here)
    return out


def _stack(name: str, module: nn.Module, held: StoredLayer, leaves: list[str]) -> Stack:
    found, tensors = ExpertsInFiles(), {}
    for leaf in leaves:
        count = module.get_parameter(leaf).shape[0]
        facts = {}
        for end, suffix in SUFFIXES.items():
            fact = held.facts.get(leaf + end)
            if fact is None or fact.shape[0] != count or (end == "_blocks") != _is_codes(fact):
                seen = "nothing" if fact is None else f"shape {list(fact.shape)}"
                msg = f"{name}: {leaf}{end} must be for {count} experts, the files hold {seen}"
                raise KernelError(msg)
            tensors[leaf + end] = fact.shape
            rows, groups = fact.shape[1:3]
            shape = (rows, groups * _BYTES) if end == "_blocks" else (rows, groups)
            facts[suffix] = TensorFact(shape, fact.dtype)
        found.parts[leaf] = Part(leaf, 0, 1)
        for number in range(count):
            one = f"{name}.{number}.{leaf}"
            found.stored[one] = StoredLayer(one, facts)
    return Stack(name, found, tensors)


def _is_codes(fact: TensorFact) -> bool:
    return len(fact.shape) == 4 and fact.shape[-1] == _BYTES  # noqa: PLR2004 - [E, O, G, 16]


def await_tensors(module: nn.Module, stack: Stack) -> None:
    """Make an experts module on the meta device ready to be given the stacked tensors.

    Raises:
        KernelError: experts that compute in a way of their own.
    """
    require_known(module, stack.found, stack.name)
    drop_parameters(module, stack.found)
    for key, shape in stack.tensors.items():
        module.register_buffer(key, torch.empty(shape, dtype=torch.uint8, device="meta"))
    # transformers would initialize the parameters of its class, which are gone
    module._is_hf_initialized = True  # type: ignore[assignment]  # noqa: SLF001


def unstack(
    module: nn.Module, stack: Stack, make: Callable[[str], nn.Module], prefer: str | None
) -> Iterator[Tensor]:
    """Give every expert its layers, prepared; yield the loaded tensors as they are done with.

    Args:
        module: the experts module, its stacked tensors loaded.
        stack: what they are.
        make: the empty layer to a name.
        prefer: name of the backend that is asked for, or None.

    Raises:
        KernelError: the tensors were left on disk, or no backend can serve.
    """
    held = {key: module.get_buffer(key) for key in stack.tensors}
    if any(tensor.device.type == "meta" for tensor in held.values()):
        msg = f"{stack.name}: packed experts that are left on disk cannot be run"
        raise KernelError(msg)
    count = len(next(iter(held.values())))
    for key in held:
        delattr(module, key)
    furnish(module, stack.found, stack.name, make)
    for leaf in stack.found.parts:
        mine = {suffix: held.pop(leaf + end) for end, suffix in SUFFIXES.items()}
        for number in range(count):
            layer = module.get_submodule(f"{number}.{leaf}")
            assert isinstance(layer, QuantLinear)
            for suffix, tensor in mine.items():
                shape = layer.get_buffer(suffix).shape
                layer.register_buffer(suffix, tensor[number].reshape(shape))
            layer.prepare(prefer)
        yield from mine.values()
    module.register_state_dict_post_hook(_stack_again)
    module.register_load_state_dict_pre_hook(_take_apart)


def _stack_again(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the tensors of single experts together in a state dict, as the files hold them."""
    count = sum(name.isdigit() for name, _ in module.named_children())
    leaves = dict.fromkeys(leaf for leaf, _ in module.get_submodule("0").named_children())
    for leaf in leaves:
        for end, suffix in SUFFIXES.items():
            keys = [f"{prefix}{number}.{leaf}.{suffix}" for number in range(count)]
            if not all(key in state for key in keys):  # made float again
                continue
            whole = torch.stack([state.pop(key) for key in keys])
            codes = end == "_blocks"
            state[f"{prefix}{leaf}{end}"] = whole.unflatten(-1, (-1, _BYTES)) if codes else whole


def _take_apart(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give every expert its tensors of a state dict that holds them together."""
    for leaf, _layer in list(module.get_submodule("0").named_children()):
        for end, suffix in SUFFIXES.items():
            whole: Tensor | None = state.pop(f"{prefix}{leaf}{end}", None)
            if whole is None:
                continue
            for number, mine in enumerate(whole.flatten(3) if whole.ndim == 4 else whole):  # noqa: PLR2004
                state[f"{prefix}{number}.{leaf}.{suffix}"] = mine.flatten(1)
