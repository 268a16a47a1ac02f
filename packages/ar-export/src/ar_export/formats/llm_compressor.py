"""Format `llm_compressor`: checkpoints of compressed-tensors, as llm-compressor writes them.

Read by vLLM, SGLang and Transformers (with compressed-tensors). One config group per scheme.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_export.errors import ExportError
from ar_export.formats.packed import (
    config_errors,
    entry,
    packed,
    refusal_of,
    require_quantized,
    skipped,
    suffixes_of,
)
from ar_export.formats.scales import with_scales_of
from ar_kernels.hf.compressed import (
    E5M3,
    LAYOUTS,
    activation_args,
    format_of,
    parse_compressed,
    weight_args,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch
    from torch import Tensor

    from ar_export.formats.base import LayerEntry, Request
    from ar_kernels import QuantizedWeight
    from ar_kernels.layouts.base import TensorFact
    from ar_schemes import LayerPlan, PlanRow, Scheme

_TILE = "block_structure"
_MIXED = "mixed-precision"
_MARKS = (".weight_packed", ".weight_scale")


class LlmCompressorFormat:
    """Format `llm_compressor`."""

    name = "llm_compressor"
    spellings = ("llm_compressor",)
    summary = "int, FP8, MXFP4/8, NVFP4 in compressed-tensors; vLLM, SGLang, Transformers"

    def refuses(self, spelling: str, scheme: Scheme, rows: int, columns: int) -> str | None:  # noqa: ARG002
        """Return why a layer [rows, columns] cannot be carried, or None."""
        if scheme.weight is None:
            return None
        form = format_of(scheme.weight, scheme.activation)
        if form is None:
            return f"compressed-tensors has no format for {scheme.weight}"
        if form == E5M3:
            return (
                "compressed-tensors knows no E5M3 scales and rejects the config; write auto_round"
            )
        act = scheme.activation
        if act is not None and act.data_type == "mx_fp_rceil":
            return "compressed-tensors cannot say that activation scales are rounded up (rceil)"
        return refusal_of(LAYOUTS[form], scheme.weight, rows, columns)

    def adjust(self, spelling: str, plan: LayerPlan, config: Mapping[str, Any]) -> LayerPlan:  # noqa: ARG002
        """Return the plan with scales in the model's type: readers compute in that of the scale."""
        return with_scales_of(plan, config, ("int", "fp"))

    def config(self, request: Request) -> dict[str, Any]:
        """Return the `quantization_config` to write.

        Raises:
            ExportError: no layer of the plan is quantized.
        """
        require_quantized(request)
        groups = _groups(request.plan)
        heads = [r.layer.name for r in request.plan.quantized if r.layer.role == "lm_head"]
        forms = [form for _, form in groups]
        out = {}
        for i, (rows, form) in enumerate(groups):
            names = [r.layer.name for r in rows]
            if i == len(groups) - 1:  # one group means all layers that no other names
                names = [*(n for n in names if n in heads), "Linear"]
            spec, act = rows[0].scheme.weight, rows[0].scheme.activation
            assert spec is not None
            out[f"group_{i}"] = {
                "targets": names,
                "weights": weight_args(spec),
                "input_activations": None if act is None else activation_args(act),
                "output_activations": None,
                "format": form,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": forms[0] if len(set(forms)) == 1 else _MIXED,
            "quantization_status": "compressed",
            "ignore": skipped(request.plan),
            "kv_cache_scheme": None,
            "config_groups": out,
            "provider": "ar-export",
        }

    def tensors(
        self,
        config: Mapping[str, Any] | None,
        weight: QuantizedWeight,
        dtype: torch.dtype,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the packed tensors of a layer by suffix."""
        assert config is not None
        wanted = weight_args(weight.spec)
        groups = config["config_groups"].values()
        exact = next((g for g in groups if g["weights"] == wanted), None)
        near = _without(wanted, _TILE)  # whose tiles hang over the edge
        found = exact or next((g for g in groups if _without(g["weights"], _TILE) == near), None)
        if found is None:
            msg = f"no config group has weights of {weight.spec}"
            raise ExportError(msg)
        return packed(LAYOUTS[found["format"]], weight, found["weights"].get(_TILE))

    def reads(self, config: Mapping[str, Any] | None) -> bool:
        """Tell whether a checkpoint with this `quantization_config` is of this format."""
        return config is not None and config.get("quant_method") == "compressed-tensors"

    def layers(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorFact]
    ) -> dict[str, LayerEntry]:
        """Return the quantized layers of a checkpoint from its config and its tensors."""
        with config_errors():
            parsed = parse_compressed(config)
        names = {k.removesuffix(mark): None for k in tensors for mark in _MARKS if k.endswith(mark)}
        out = {}
        for name in names:
            with config_errors():
                group = parsed.find(name)
            if group is None:
                msg = f"layer {name} has packed tensors but the config says it is not quantized"
                raise ExportError(msg)
            out[name] = entry(name, group.scheme, LAYOUTS[group.format], tensors)
        return out

    def suffixes(self, entry: LayerEntry) -> Collection[str]:
        """Return the tensor suffixes of a quantized layer."""
        return suffixes_of(entry)


def _without(args: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in args.items() if k != key}


def _groups(plan: LayerPlan) -> list[tuple[list[PlanRow], str]]:
    """Return rows by scheme with their compression format, the commonest scheme last.

    Layers of equal weights are stored alike: int8 with and without quantized activations in one
    checkpoint are both int-quantized.
    """
    groups: dict[tuple[Any, Any], list[PlanRow]] = {}
    for row in plan.quantized:
        groups.setdefault((row.scheme.weight, row.scheme.activation), []).append(row)
    with_act = {weight: act for weight, act in groups if act is not None}
    out = []
    for (weight, act), rows in sorted(groups.items(), key=lambda item: len(item[1])):
        form = format_of(weight, act or with_act.get(weight))
        assert form is not None
        out.append((rows, form))
    return out
