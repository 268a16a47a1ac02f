"""Format `auto_round`: `quant_method` auto-round, in all its packings.

Read by Transformers (with auto-round or ar-kernels), vLLM and SGLang. Key by key it follows what
auto-round 0.16.1 writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_export.errors import ExportError
from ar_export.formats.auto_gptq import integer_layers
from ar_export.formats.packed import (
    default_scheme,
    expert_lists,
    packed,
    refusal_of,
    require_quantized,
    skipped,
    suffixes_of,
)
from ar_export.formats.scales import with_scales_of
from ar_kernels.hf.config import packed_layout
from ar_schemes import Span, unknown_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch
    from torch import Tensor

    from ar_export.formats.base import LayerEntry, Request
    from ar_kernels import QuantizedWeight
    from ar_kernels.layouts.base import TensorFact
    from ar_schemes import LayerPlan, Scheme

_SKIPPED = {"bits": 16, "data_type": "fp"}
_GPTQ, _PLAIN, _V2 = "auto_round:auto_gptq", "auto_round", "auto_round:gptqmodel"
_AWQ, _CT, _E5M3 = (
    "auto_round:auto_awq",
    "auto_round:llm_compressor",
    "auto_round:llm_compressor_nvfp4_e5m3",
)
_STATIC, _BLOCK = "auto_round:fp8_static", "auto_round:fp8"
_WRITTEN_FOR = "0.16.1"
"""Version of the reference implementation whose config this is; readers take it as a hint."""
_INTEGER = (_GPTQ, _PLAIN, _V2, _AWQ)
_FLOATS = {"mx_fp": _CT, "nv_fp": _CT, "nvfp4_v2": _E5M3, "mx_int": _PLAIN}


class AutoRoundFormat:
    """Format `auto_round`."""

    name = "auto_round"
    spellings = (_PLAIN, _GPTQ, _V2, _AWQ, _CT, _BLOCK)
    summary = "int 2-8 bits, MXFP4/8, NVFP4, FP8; auto-round, ar-kernels, vLLM, SGLang (int 4, 8)"

    def refuses(self, spelling: str, scheme: Scheme, rows: int, columns: int) -> str | None:
        """Return why a layer [rows, columns] cannot be carried, or None."""
        spec = scheme.weight
        if spec is None:
            return None
        why = _refusal(scheme)
        if why is not None:
            return why
        packing = _packing(spelling, [scheme])
        wanted = _packing(_PLAIN, [scheme])
        if spec.data_type != "int":
            if spelling not in (_PLAIN, wanted):
                return f"{spelling} does not hold {spec.data_type}; use {_PLAIN}"
        elif spelling == _GPTQ and not spec.symmetric:
            return f"{_GPTQ} holds symmetric weights; use auto_round for asymmetric"
        elif packing not in _INTEGER:
            return f"{spelling} does not hold weight-only integers; use {_PLAIN}"
        return refusal_of(packed_layout(packing, scheme), spec, rows, columns)

    def adjust(self, spelling: str, plan: LayerPlan, config: Mapping[str, Any]) -> LayerPlan:  # noqa: ARG002
        """Return the plan with FP8 scales per channel in the model's type, as readers hold them."""
        static = all(
            r.scheme.weight is None or r.scheme.weight.granularity.span is Span.CHANNEL
            for r in plan.quantized
        )
        return with_scales_of(plan, config, ("fp",)) if static else plan

    def config(self, request: Request) -> dict[str, Any]:
        """Return the `quantization_config` to write.

        Raises:
            ExportError: no layer is quantized, or their schemes need different packings.
        """
        require_quantized(request)
        default = default_scheme(request.plan)
        quantized = [default, *(row.scheme for row in request.plan.quantized)]
        flat = default.to_dict()
        packing = _packing(request.format, quantized)
        _check_one_packing(request, packing)
        out: dict[str, Any] = {k: v for k, v in request.facts.items() if v is not None}
        out |= {"quant_method": "auto-round", "packing_format": packing, **flat}
        if default.weight is not None and default.weight.data_type == "fp":
            act = default.activation
            out |= {"fmt": "e4m3"}
            if act is not None:
                out["activation_scheme"] = "dynamic" if act.dynamic else "static"
            if default.weight.granularity.span is Span.TILE:
                out["weight_block_size"] = list(default.weight.granularity.size)
                out["ignored_layers"] = skipped(request.plan)
        out |= {
            "block_name_to_quantize": ",".join(request.blocks),
            "autoround_version": _WRITTEN_FOR,
            "producer": "ar-export",
        }
        extra = _extra(request.plan, flat, request.blocks)
        if extra:
            out["extra_config"] = extra
        return out

    def tensors(
        self,
        config: Mapping[str, Any] | None,
        weight: QuantizedWeight,
        dtype: torch.dtype,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the packed tensors of a layer by suffix, in the bit order the config names."""
        assert config is not None
        order = packed_layout(config["packing_format"], weight.spec)
        return packed(order, weight, config.get("weight_block_size"))

    def reads(self, config: Mapping[str, Any] | None) -> bool:
        """Tell whether a checkpoint with this `quantization_config` is of this format."""
        return config is not None and config.get("quant_method") == "auto-round"

    def layers(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorFact]
    ) -> dict[str, LayerEntry]:
        """Return the quantized layers of a checkpoint from its config and its tensors."""
        return integer_layers(config, tensors)

    def suffixes(self, entry: LayerEntry) -> Collection[str]:
        """Return the tensor suffixes of a quantized layer."""
        return suffixes_of(entry)


def _refusal(scheme: Scheme) -> str | None:
    """Return why no packing of auto_round can say a scheme, or None."""
    spec, act = scheme.weight, scheme.activation
    assert spec is not None
    if spec.super_group is not None or spec.data_type == "int_asym_float_zp":
        return f"auto_round has no packing for {spec.data_type}; write gguf"
    if spec.data_type == "int" and act is not None:
        return "auto_round has no packing for integers with quantized activations; llm_compressor"
    if act is not None and act.data_type == "mx_fp_rceil":
        return "readers of auto_round round activation scales down; rceil cannot be said"
    if spec.data_type not in ("int", "fp", *_FLOATS):
        return f"auto_round has no packing for the data type {spec.data_type}"
    return None


def _packing(spelling: str, quantized: Collection[Scheme]) -> str:
    """Return the one `packing_format` of a checkpoint: zero points have one convention in it."""
    if spelling not in AutoRoundFormat.spellings:
        raise ExportError(unknown_name("format", spelling, AutoRoundFormat.spellings))
    if spelling != _PLAIN:
        return spelling
    specs = [s.weight for s in quantized if s.weight is not None]
    first = next(iter(quantized))
    kind = specs[0].data_type
    if kind == "fp":
        act = first.activation
        return _STATIC if act is not None and not act.dynamic else _BLOCK
    if kind != "int":
        return _FLOATS.get(kind, _PLAIN)
    if all(spec.symmetric for spec in specs):
        return _GPTQ
    one = len({(spec.bits, spec.symmetric) for spec in specs}) == 1
    return _AWQ if one and specs[0].bits == 4 else _PLAIN  # noqa: PLR2004


def _check_one_packing(request: Request, packing: str) -> None:
    """Refuse schemes that the packing of the others cannot hold, all layers in one message."""
    bad = []
    for row in request.plan.quantized:
        assert row.scheme.weight is not None
        order = packed_layout(packing, row.scheme)
        integer = row.scheme.weight.data_type == "int"
        why = refusal_of(order, row.scheme.weight, row.layer.rows, row.layer.columns)
        if why is None and integer is not (packing in _INTEGER):
            if (packing, row.scheme.weight.data_type) == (_PLAIN, "mx_int"):
                continue
            why = f"{row.scheme.weight} needs another packing than {packing}"
        if why is not None:
            bad.append(f"{row.layer.name}: {why}")
    if bad:
        what = "; ".join(bad)
        msg = (
            f"format {request.format} has one packing per checkpoint: {what}. "
            "llm_compressor holds several."
        )
        raise ExportError(msg)


def _extra(plan: LayerPlan, flat: Mapping[str, Any], blocks: Sequence[str]) -> dict[str, Any]:
    """Return what differs from the default, layer by layer."""
    out: dict[str, Any] = {}
    for row in plan.rows:
        inside = any(row.layer.name.startswith(f"{block}.") for block in blocks)
        if not row.quantized:
            if row.layer.block is not None:
                out[row.layer.name] = dict(_SKIPPED)
            continue
        mine = row.scheme.to_dict()
        if "act_bits" in flat and "act_bits" not in mine:
            mine["act_bits"] = 16
        differing = {k: v for k, v in mine.items() if flat.get(k) != v}
        if not inside:
            out[row.layer.name] = mine
        elif differing:
            out[row.layer.name] = differing
    return out | expert_lists(plan, out)
