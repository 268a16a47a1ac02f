"""Single experts put together again, for float files of models whose own files hold them fused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_export.opening import architecture
from ar_kernels.hf.fused import fused_parts, joined_experts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from ar_schemes import LayerPlan


_MANY = 3
_SINGLE = ("gate_proj", "up_proj", "down_proj")


class Joiner:
    """Takes weights of single experts and gives back whole parameters as they become complete."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import AutoConfig
        from transformers.core_model_loading import revert_weight_conversion

        settings = {k: v for k, v in config.items() if k != "quantization_config"}
        described = AutoConfig.for_model(**settings)
        with torch.device("meta"):
            self._model = architecture(described)(described)
        own = revert_weight_conversion(self._model, dict(self._model.state_dict()))
        self._groups: dict[str, frozenset[str]] = {}
        self._waiting: dict[str, Tensor] = {}
        for name, module in self._model.named_modules():
            kinds = fused_parts(module)
            if isinstance(kinds, str):
                continue
            for leaf in {part.parameter for part in kinds.values()}:
                mine = [kind for kind, part in kinds.items() if part.parameter == leaf]
                count = len(module.get_parameter(leaf))
                keys = {f"{name}.{e}.{kind}.weight" for e in range(count) for kind in mine}
                if not keys & own.keys():
                    self._groups |= dict.fromkeys(keys, frozenset(keys))
        self._stacks = {key: stack for stack in _stacks(own) for key in stack.members}

    def take(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return what can be written now: the tensor itself, a whole parameter, or nothing yet."""
        stack = self._stacks.get(name)
        if stack is not None:
            self._waiting[name] = tensor
            if not self._waiting.keys() >= set(stack.members):
                return {}
            parts = [self._waiting.pop(key) for key in stack.members]
            return {stack.name: torch.stack(parts)}
        group = self._groups.get(name)
        if group is None:
            return {name: tensor}
        self._waiting[name] = tensor
        if not group <= self._waiting.keys():
            return {}
        return joined_experts({key: self._waiting.pop(key) for key in group}, self._model)


@dataclass(frozen=True)
class _Stack:
    """A tensor of a model's own files [E, O, I], and the names of its matrices one by one."""

    name: str
    members: tuple[str, ...]


def _stacks(own: Mapping[str, Tensor]) -> Iterator[_Stack]:
    """Yield the stacks of projections that files hold beside their experts (step3p7)."""
    for name, tensor in own.items():
        prefix, _, kind = name.removesuffix(".weight").rpartition(".")
        if tensor.ndim == _MANY and kind in _SINGLE and name.endswith(".weight"):
            members = (f"{prefix}.experts.{e}.{kind}.weight" for e in range(len(tensor)))
            yield _Stack(name, tuple(members))


def joiner_for(plan: LayerPlan, config: Mapping[str, Any]) -> Joiner | None:
    """Return what joins experts, or None where a plan quantizes none."""
    experts = any(row.layer.role == "experts" for row in plan.quantized)
    return Joiner(config) if experts and "model_type" in config else None
