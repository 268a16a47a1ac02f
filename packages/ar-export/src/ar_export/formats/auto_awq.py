"""Format `auto_awq`: `quant_method` awq, the GEMM layout. Uniform 4 bits and skipped layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_export.errors import ExportError
from ar_export.formats.auto_gptq import integer_layers
from ar_export.formats.packed import (
    expert_lists,
    kept_parts,
    require_quantized,
    skipped,
    suffixes_of,
)
from ar_kernels import layout

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch
    from torch import Tensor

    from ar_export.formats.base import LayerEntry, Request
    from ar_kernels import QuantizedWeight
    from ar_kernels.layouts.base import TensorFact
    from ar_schemes import LayerPlan, Scheme


def _skipped(plan: LayerPlan) -> list[str]:
    """Return what stays in 16 bit; vLLM asks for experts and fused layers by names of its own."""
    names = skipped(plan)
    return [*names, *expert_lists(plan, dict.fromkeys(names, True)), *kept_parts(plan)]


class AutoAwqFormat:
    """Format `auto_awq`."""

    name = "auto_awq"
    spellings = ("auto_awq",)
    summary = "int 4 bits, AWQ GEMM, one scheme for all layers; vLLM, SGLang, GPTQModel"
    dtype = "float16"

    def refuses(self, spelling: str, scheme: Scheme, rows: int, columns: int) -> str | None:  # noqa: ARG002
        """Return why a layer [rows, columns] cannot be carried, or None."""
        if scheme.weight is None:
            return None
        if scheme.activation is not None:
            return "awq has weights only, no quantized activations"
        return layout("awq").refuses(scheme.weight, rows, columns)

    def config(self, request: Request) -> dict[str, Any]:
        """Return the `quantization_config` to write.

        Raises:
            ExportError: no layer is quantized, or layers have different schemes.
        """
        require_quantized(request)
        kinds = {r.scheme.weight: r.layer.name for r in request.plan.quantized}
        if len(kinds) > 1:
            listed = "; ".join(f"{name}: {spec}" for spec, name in kinds.items())
            msg = f"format auto_awq holds one scheme for all layers, the plan has {listed}"
            raise ExportError(msg)
        spec = next(iter(kinds))
        assert spec is not None
        return {
            "quant_method": "awq",
            "bits": spec.bits,
            "group_size": spec.group_size,
            "sym": spec.symmetric,
            "zero_point": not spec.symmetric,
            "version": "gemm",
            "lm_head": any(r.layer.role == "lm_head" for r in request.plan.quantized),
            "modules_to_not_convert": _skipped(request.plan),
            "provider": "ar-export",
        }

    def tensors(
        self,
        config: Mapping[str, Any] | None,  # noqa: ARG002
        weight: QuantizedWeight,
        dtype: torch.dtype,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the packed tensors of a layer by suffix."""
        return layout("awq").pack(weight)

    def reads(self, config: Mapping[str, Any] | None) -> bool:
        """Tell whether a checkpoint with this `quantization_config` is of this format."""
        return config is not None and config.get("quant_method") == "awq"

    def layers(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorFact]
    ) -> dict[str, LayerEntry]:
        """Return the quantized layers of a checkpoint from its config and its tensors."""
        return integer_layers(config, tensors)

    def suffixes(self, entry: LayerEntry) -> Collection[str]:
        """Return the tensor suffixes of a quantized layer."""
        return suffixes_of(entry)
