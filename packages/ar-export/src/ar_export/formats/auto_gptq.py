"""Format `auto_gptq`: `quant_method` gptq, as GPTQModel and AutoGPTQ write it.

Version 1 stores zero points minus one and cannot hold 0; asymmetric weights go as gptq_v2. vLLM
and SGLang take symmetric 4 and 8 bits, GPTQModel all widths.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ar_export.errors import ExportError
from ar_export.formats.packed import (
    config_errors,
    default_scheme,
    entry,
    expert_lists,
    require_quantized,
    suffixes_of,
)
from ar_kernels import layout
from ar_kernels.hf.config import parse

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch
    from torch import Tensor

    from ar_export.formats.base import LayerEntry, Request
    from ar_kernels import QuantizedWeight
    from ar_kernels.layouts.base import TensorFact
    from ar_schemes import LayerPlan, PlanRow, Scheme

_WIDTHS = (2, 3, 4, 8)
_V1, _V2 = "gptq", "gptq_v2"
_FUSED = (
    (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    (("gate_proj", "up_proj"), "gate_up_proj"),
)
_KEYS = ("bits", "group_size", "sym")
_HEAD = "lm_head"
"""Of a head by this name, the key `lm_head` speaks."""


class AutoGptqFormat:
    """Format `auto_gptq`."""

    name = "auto_gptq"
    spellings = ("auto_gptq", "gptqmodel", "auto_gptq:gptq_v2")
    summary = "int 2, 3, 4, 8 bits, GPTQ; GPTQModel, Transformers, vLLM and SGLang (sym 4, 8)"
    dtype = "float16"
    config_names = ("quantize_config.json",)

    def refuses(self, spelling: str, scheme: Scheme, rows: int, columns: int) -> str | None:  # noqa: ARG002
        """Return why a layer [rows, columns] cannot be carried, or None."""
        if scheme.weight is None:
            return None
        if scheme.activation is not None:
            return "gptq has weights only, no quantized activations"
        if scheme.weight.data_type == "int" and scheme.weight.bits not in _WIDTHS:
            return f"gptq readers know 2, 3, 4 and 8 bits, not {scheme.weight.bits}"
        return layout(_V1).refuses(scheme.weight, rows, columns)

    def config(self, request: Request) -> dict[str, Any]:
        """Return the `quantization_config` to write.

        Raises:
            ExportError: no layer of the plan is quantized.
        """
        require_quantized(request)
        default = default_scheme(request.plan)
        flat = default.to_dict()
        quantized = request.plan.quantized
        symmetric = all(r.scheme.weight is None or r.scheme.weight.symmetric for r in quantized)
        version = _V2 if request.format.endswith(_V2) or not symmetric else _V1
        out: dict[str, Any] = {
            "quant_method": "gptq",
            **{key: flat[key] for key in _KEYS},
            "desc_act": False,
            "static_groups": False,
            "true_sequential": False,
            "damp_percent": 0.01,
            "checkpoint_format": version,
            "lm_head": any(r.layer.role == "lm_head" for r in quantized),
            "provider": "ar-export",
        }
        dynamic = _dynamic(request.plan, flat)
        if dynamic:
            out["dynamic"] = dynamic
        return out

    def tensors(
        self,
        config: Mapping[str, Any] | None,
        weight: QuantizedWeight,
        dtype: torch.dtype,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the packed tensors of a layer by suffix."""
        assert config is not None
        return layout(f"{config['checkpoint_format']}_g_idx").pack(weight)

    def reads(self, config: Mapping[str, Any] | None) -> bool:
        """Tell whether a checkpoint with this `quantization_config` is of this format."""
        return config is not None and config.get("quant_method") == "gptq"

    def layers(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorFact]
    ) -> dict[str, LayerEntry]:
        """Return the quantized layers of a checkpoint from its config and its tensors."""
        return integer_layers(config, tensors)

    def suffixes(self, entry: LayerEntry) -> Collection[str]:
        """Return the tensor suffixes of a quantized layer."""
        return suffixes_of(entry)


def integer_layers(
    config: Mapping[str, Any], tensors: Mapping[str, TensorFact]
) -> dict[str, LayerEntry]:
    """Return the layers with packed tensors, under a config that `ar_kernels.hf` parses.

    Raises:
        ExportError: config and tensors contradict each other.
    """
    marks = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
    names = {k.removesuffix(mark): None for k in tensors for mark in marks if k.endswith(mark)}
    with config_errors():
        parsed = parse(config, reading=True)
        chosen = parsed.resolve({n: (n,) for n in names})
    out = {}
    for name in names:
        found = chosen.get(name)
        if found is None or found.scheme.weight is None:
            msg = f"layer {name} has packed tensors but the config says it is not quantized"
            raise ExportError(msg)
        order = parsed.layout_for(found.scheme, g_idx=f"{name}.g_idx" in tensors)
        out[name] = entry(name, found.scheme, order, tensors)
    return out


def _dynamic(plan: LayerPlan, flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what differs from the default, as patterns on names; engines ask fused names too."""
    changes: dict[str, dict[str, Any] | None] = {}
    for row in plan.rows:
        if not row.quantized:
            if row.layer.role != "embedding" and row.layer.name != _HEAD:
                changes[row.layer.name] = None
            continue
        mine = row.scheme.to_dict()
        differing = {key: mine[key] for key in _KEYS if mine[key] != flat[key]}
        if differing:
            changes[row.layer.name] = {key: mine[key] for key in _KEYS}
    out: dict[str, dict[str, Any]] = {}
    for name, change in changes.items():
        pattern = f".*{_pattern(name, changes, plan.rows)}$"
        out[f"-:{pattern}" if change is None else f"+:{pattern}"] = change or {}
    for name, change in expert_lists(plan, {k: v or {} for k, v in changes.items()}).items():
        out[f"{'+' if change else '-'}:.*{re.escape(name)}$"] = change
    return out


def _pattern(name: str, changes: Mapping[str, Any], rows: Sequence[PlanRow]) -> str:
    """Return a pattern for a name, with that of its fused group when all of it changes alike."""
    parent, _, tail = name.rpartition(".")
    there = {row.layer.name for row in rows}
    for members, fused in _FUSED:
        mates = [f"{parent}.{m}" for m in members if f"{parent}.{m}" in there]
        alike = all(mate in changes and changes[mate] == changes[name] for mate in mates)
        if tail in members and len(mates) == len(members) and alike:
            return re.escape(f"{parent}.") + f"({'|'.join((*members, fused))})"
    return re.escape(name)
