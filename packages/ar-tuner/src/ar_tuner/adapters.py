"""What must be known of a model beyond the generic rules: the adapter protocol and its default."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_KEEP = (
    (
        re.compile(r"(^|\.)(indexer|weights_proj)(\.|$)"),
        "attention indexer: tiny, decides what is seen",
    ),
    (
        re.compile(r"(^|\.)(in_proj_a|in_proj_b|in_proj_ba|b_proj|g_proj|x_proj|dt_proj)$"),
        "gate of linear attention or state space: small and sensitive",
    ),
    (re.compile(r"(^|\.)(eh_proj|altup\w*|laurel\w*|per_layer\w*)(\.|$)"), "small mixing layer"),
)
_SMALL = 8
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate|gate_network)(\.|$)")


@runtime_checkable
class ModelAdapter(Protocol):
    """How one model departs from the generic rules.

    Four members are optional, for models that see. `configured(asked) -> ModelAdapter`: the
    adapter for what a user asks (`ar_tuner.imagery.Asked`). `imagery`: None, or an
    `ar_tuner.imagery.Imagery`, which gives samples with images. `further_blocks(model, lists) ->
    names`: modules outside of the decoder's lists that are tuned as blocks. `check_reached(layers,
    note)`: judges the layers to be quantized that a row of text gives no gradient.
    """

    name: str

    def entry(self, model: nn.Module) -> nn.Module:
        """Return the module whose forward drives calibration."""

    def block_lists(self, model: nn.Module) -> tuple[str, ...] | None:
        """Return the paths of the lists of decoder blocks, or None for the generic rule."""

    def inputs(self, model: nn.Module, rows: Tensor) -> Mapping[str, object]:
        """Return the keyword arguments of the entry's forward for token rows [B, T]."""

    def keep(self, name: str, module: nn.Module) -> str | None:
        """Return why a layer stays in high precision, or None."""

    def is_router(self, name: str, module: nn.Module) -> bool:
        """Tell whether a layer chooses experts."""


class GenericAdapter:
    """The rules that carry nearly every model (measured over 285 model types)."""

    name = "generic"

    def entry(self, model: nn.Module) -> nn.Module:
        """Return the model, or the largest child with `input_ids` if it has no forward."""
        if getattr(type(model).forward, "__name__", "") != "_forward_unimplemented":
            return model
        children = [
            child
            for child in model.children()
            if "input_ids" in inspect.signature(child.forward).parameters
        ]
        return max(children, key=lambda c: sum(p.numel() for p in c.parameters()))

    def block_lists(self, model: nn.Module) -> tuple[str, ...] | None:  # noqa: ARG002
        """Return None: the generic discovery decides."""
        return None

    def inputs(self, model: nn.Module, rows: Tensor) -> Mapping[str, object]:  # noqa: ARG002
        """Return token ids without a mask (rows are packed full) and without a cache."""
        return {"input_ids": rows, "use_cache": False}

    def keep(self, name: str, module: nn.Module) -> str | None:
        """Return why a layer stays in high precision, or None."""
        for pattern, reason in _KEEP:
            if pattern.search(name):
                return reason
        weight = module.weight
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and min(weight.shape) == 1:
            return "single output: a gate"
        if _computes_otherwise(module) and not self.is_router(name, module):
            # readers put layers of their own in its place, which only multiply
            return f"multiplies in a way of its own ({type(module).__name__})"
        return None

    def is_router(self, name: str, module: nn.Module) -> bool:
        """Tell whether a layer chooses experts: named like one and much narrower than wide."""
        weight = module.weight
        return (
            bool(_ROUTER.search(name))
            and isinstance(weight, torch.Tensor)
            and (weight.shape[0] <= weight.shape[-1] // 4 or weight.shape[0] < 32)
        )


def _computes_otherwise(module: nn.Module) -> bool:
    """Tell whether a linear layer with a forward of its own gives anything but x W^T + b.

    It is tried on a small weight, so that layers without weights can be asked, too.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, _SMALL, generator=generator) * 100  # beyond what any clipping lets by
    given = {"weight": torch.randn(_SMALL, _SMALL, generator=generator)}
    if module.bias is not None:
        given["bias"] = torch.randn(_SMALL, generator=generator)
    try:
        made = torch.func.functional_call(module, given, (x,))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return True
    plain = nn.functional.linear(x, given["weight"], given.get("bias"))
    alike = isinstance(made, torch.Tensor) and made.shape == plain.shape
    return not alike or not torch.allclose(made, plain, rtol=1e-4)
