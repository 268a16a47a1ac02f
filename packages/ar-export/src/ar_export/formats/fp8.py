"""Format `fp8`: the FP8 block checkpoints of DeepSeek and Qwen, `quant_method` fp8.

Tiles of 128 x 128 with float32 scales, activations quantized at run time. Read by Transformers,
vLLM and SGLang.
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
from ar_schemes import Granularity, Span, scheme_from_dict

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch
    from torch import Tensor

    from ar_export.formats.base import LayerEntry, Request
    from ar_kernels import QuantizedWeight
    from ar_kernels.layouts.base import TensorFact
    from ar_schemes import Scheme

_LAYOUT = "fp8_block"
_SCALE = ".weight_scale_inv"


class Fp8Format:
    """Format `fp8`."""

    name = "fp8"
    spellings = ("fp8",)
    summary = "FP8 in tiles of 128 x 128 (FP8_BLOCK); Transformers, vLLM, SGLang"

    def refuses(self, spelling: str, scheme: Scheme, rows: int, columns: int) -> str | None:  # noqa: ARG002
        """Return why a layer [rows, columns] cannot be carried, or None."""
        if scheme.weight is None:
            return None
        why = refusal_of(_LAYOUT, scheme.weight, rows, columns)
        if why is not None:
            return f"fp8 holds FP8_BLOCK only: {why}"
        act = scheme.activation
        tile = scheme.weight.granularity.size
        if act is None or not act.dynamic or act.granularity != Granularity(Span.GROUP, (tile[1],)):
            return f"fp8 quantizes activations at run time in groups of {tile[1]}"
        return None

    def config(self, request: Request) -> dict[str, Any]:
        """Return the `quantization_config` to write.

        Raises:
            ExportError: no layer is quantized, or tiles of several sizes.
        """
        require_quantized(request)
        sizes = {
            r.scheme.weight.granularity.size for r in request.plan.quantized if r.scheme.weight
        }
        if len(sizes) > 1:
            msg = f"format fp8 holds tiles of one size, the plan has {sorted(sizes)}"
            raise ExportError(msg)
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(sizes.pop()),
            "modules_to_not_convert": skipped(request.plan),
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
        return packed(_LAYOUT, weight, config["weight_block_size"])

    def reads(self, config: Mapping[str, Any] | None) -> bool:
        """Tell whether a checkpoint with this `quantization_config` is of this format."""
        return config is not None and config.get("quant_method") == "fp8"

    def layers(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorFact]
    ) -> dict[str, LayerEntry]:
        """Return the quantized layers of a checkpoint from its config and its tensors."""
        tile = config.get("weight_block_size")
        if not (isinstance(tile, list) and len(tile) == 2):  # noqa: PLR2004
            msg = f"quantization_config: weight_block_size must be two numbers, not {tile!r}"
            raise ExportError(msg)
        flat = {"bits": 8, "data_type": "fp", "group_size": tile, "act_bits": 8}
        with config_errors():
            found = scheme_from_dict(
                {**flat, "act_data_type": "fp", "act_group_size": tile[1], "act_dynamic": True}
            )
        names = [k.removesuffix(_SCALE) for k in tensors if k.endswith(_SCALE)]
        return {name: entry(name, found, _LAYOUT, tensors) for name in names}

    def suffixes(self, entry: LayerEntry) -> Collection[str]:
        """Return the tensor suffixes of a quantized layer."""
        return suffixes_of(entry)
