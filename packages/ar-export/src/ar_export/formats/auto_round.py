"""Format `auto_round`: integer weights in GPTQ bit order, `quant_method` auto-round.

Read by Transformers (with auto-round or ar-kernels), vLLM and SGLang. Key by key it follows what
auto-round 0.16.1 writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_export.errors import ExportError
from ar_export.formats.base import LayerEntry
from ar_kernels import KernelError, layout
from ar_kernels.hf.config import parse
from ar_schemes import SchemeError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch
    from torch import Tensor

    from ar_export.formats.base import Request
    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerPlan, Scheme

_SKIPPED = {"bits": 16, "data_type": "fp"}
_WORD = 32
_WRITTEN_FOR = "0.16.1"
"""Version of the reference implementation whose config this is; readers take it as a hint."""


class AutoRoundFormat:
    """Integer weights of 2 to 8 bits, mixed widths allowed."""

    name = "auto_round"
    spellings = ("auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel")
    summary = "int 2-8 bits; Transformers (auto-round or ar-kernels), vLLM and SGLang (4, 8 bits)"

    def refuses(self, spelling: str, scheme: Scheme, rows: int, columns: int) -> str | None:
        """Return why a layer [rows, columns] cannot be carried, or None."""
        if scheme.weight is None:
            return None
        if scheme.activation is not None:
            return "auto_round carries weight-only int schemes here, not quantized activations"
        if spelling == "auto_round:auto_gptq" and not scheme.weight.symmetric:
            return "auto_round:auto_gptq holds symmetric weights; use auto_round for asymmetric"
        return layout(_layout(spelling, scheme.weight.symmetric)).refuses(
            scheme.weight, rows, columns
        )

    def config(self, request: Request) -> dict[str, Any]:
        """Return the `quantization_config` to write."""
        default = request.plan.default
        assert default.weight is not None
        flat = default.to_dict()
        out: dict[str, Any] = {
            "quant_method": "auto-round",
            "packing_format": _packing(request.format, default.weight.symmetric),
            "bits": flat["bits"],
            "group_size": flat["group_size"],
            "sym": flat["sym"],
            "data_type": flat["data_type"],
            "block_name_to_quantize": ",".join(request.blocks),
        }
        out |= {k: v for k, v in request.facts.items() if v is not None}
        out |= {"autoround_version": _WRITTEN_FOR, "producer": "ar-export"}
        extra = _extra(request.plan, flat)
        if extra:
            out["extra_config"] = extra
        return out

    def tensors(
        self,
        spelling: str,
        weight: QuantizedWeight,
        dtype: torch.dtype,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the packed tensors of a layer by suffix."""
        return layout(_layout(spelling, weight.spec.symmetric)).pack(weight)

    def reads(self, config: Mapping[str, Any] | None) -> bool:
        """Tell whether a checkpoint with this `quantization_config` is of this format."""
        return config is not None and config.get("quant_method") == "auto-round"

    def layers(
        self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, LayerEntry]:
        """Return the quantized layers of a checkpoint from its config and tensor shapes."""
        names = [k.removesuffix(".qweight") for k in shapes if k.endswith(".qweight")]
        try:
            parsed = parse(config)
            chosen = parsed.resolve({n: (n,) for n in names})
        except (KernelError, SchemeError) as error:
            msg = f"quantization_config: {error}"
            raise ExportError(msg) from error
        out = {}
        for name in names:
            found = chosen.get(name)
            if found is None or found.scheme.weight is None:
                msg = f"layer {name} has packed tensors but the config says it is not quantized"
                raise ExportError(msg)
            scales = shapes.get(f"{name}.scales")
            if scales is None or len(scales) != 2:  # noqa: PLR2004
                msg = f"layer {name}: {name}.scales is missing or not a matrix"
                raise ExportError(msg)
            variant = parsed.variant(f"{name}.g_idx" in shapes)
            columns = shapes[f"{name}.qweight"][0] * _WORD // found.scheme.weight.bits
            out[name] = LayerEntry(found.scheme, scales[1], columns, variant)
        return out

    def suffixes(self, entry: LayerEntry) -> Collection[str]:
        """Return the tensor suffixes of a quantized layer."""
        assert entry.scheme.weight is not None
        return tuple(layout(entry.layout).facts(entry.scheme.weight, entry.rows, entry.columns))


def _packing(spelling: str, symmetric: bool) -> str:  # noqa: FBT001
    """Return the `packing_format` a spelling resolves to."""
    if spelling == "auto_round:gptqmodel":
        return spelling
    if spelling in ("auto_round", "auto_round:auto_gptq"):
        return "auto_round:auto_gptq" if symmetric else "auto_round"
    raise ExportError(unknown_name("format", spelling, AutoRoundFormat.spellings))


def _layout(spelling: str, symmetric: bool) -> str:  # noqa: FBT001
    return {
        "auto_round:auto_gptq": "gptq",
        "auto_round": "gptq_v2",
        "auto_round:gptqmodel": "gptq_v2_g_idx",
    }[_packing(spelling, symmetric)]


def _extra(plan: LayerPlan, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs from the default, layer by layer."""
    out: dict[str, Any] = {}
    for row in plan.rows:
        inside = row.layer.block is not None
        if not row.quantized:
            if inside:
                out[row.layer.name] = dict(_SKIPPED)
            continue
        mine = row.scheme.to_dict()
        differing = {k: v for k, v in mine.items() if flat.get(k) != v}
        if not inside:
            out[row.layer.name] = mine
        elif differing:
            out[row.layer.name] = differing
    return out
