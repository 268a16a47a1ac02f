"""Single experts put together again, for float files of models whose own files hold them fused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ar_export.opening import architecture
from ar_kernels.hf.fused import fused_parts, joined_experts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ar_schemes import LayerPlan


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

    def take(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return what can be written now: the tensor itself, a whole parameter, or nothing yet."""
        group = self._groups.get(name)
        if group is None:
            return {name: tensor}
        self._waiting[name] = tensor
        if not group <= self._waiting.keys():
            return {}
        return joined_experts({key: self._waiting.pop(key) for key in group}, self._model)


def joiner_for(plan: LayerPlan, config: Mapping[str, Any]) -> Joiner | None:
    """Return what joins experts, or None where a plan quantizes none."""
    experts = any(row.layer.role == "experts" for row in plan.quantized)
    return Joiner(config) if experts and "model_type" in config else None
