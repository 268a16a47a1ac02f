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
_SCALES = "float16"
_SYMMETRIC = "auto_round:auto_gptq"
_LAYOUTS = {
    _SYMMETRIC: "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2_g_idx",
}
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
        if spelling == _SYMMETRIC and not scheme.weight.symmetric:
            return "auto_round:auto_gptq holds symmetric weights; use auto_round for asymmetric"
        if scheme.weight.scale_dtype != _SCALES:
            return f"auto_round holds scales in {_SCALES}, not {scheme.weight.scale_dtype}"
        order = _LAYOUTS[_packing(spelling, [scheme])]
        return layout(order).refuses(scheme.weight, rows, columns)

    def config(self, request: Request) -> dict[str, Any]:
        """Return the `quantization_config` to write.

        Raises:
            ExportError: no layer of the plan is quantized, or the spelling is not ours.
        """
        quantized = [row.scheme for row in request.plan.quantized]
        if not quantized:
            msg = (
                f"format {request.format}: the plan quantizes no layer, so there is nothing to "
                "pack. Choose another scheme, or write the floats with format fake."
            )
            raise ExportError(msg)
        flat = _default(request.plan).to_dict()
        out: dict[str, Any] = {k: v for k, v in request.facts.items() if v is not None}
        out |= {
            "quant_method": "auto-round",
            "packing_format": _packing(request.format, quantized),
            "bits": flat["bits"],
            "group_size": flat["group_size"],
            "sym": flat["sym"],
            "data_type": flat["data_type"],
            "block_name_to_quantize": ",".join(request.blocks),
            "autoround_version": _WRITTEN_FOR,
            "producer": "ar-export",
        }
        extra = _extra(request.plan, flat)
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
        return layout(_LAYOUTS[config["packing_format"]]).pack(weight)

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
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # foreign JSON: a list where an object belongs, a word where a number does
            msg = f"quantization_config: a value of the wrong kind: {error}"
            raise ExportError(msg) from error
        out = {}
        for name in names:
            found = chosen.get(name)
            if found is None or found.scheme.weight is None:
                msg = f"layer {name} has packed tensors but the config says it is not quantized"
                raise ExportError(msg)
            variant = parsed.variant(f"{name}.g_idx" in shapes)
            rows, columns = _shape(name, found.scheme, shapes)
            why = layout(variant).refuses(found.scheme.weight, rows, columns)
            if why is not None:
                msg = f"layer {name}: the config does not fit its tensors: {why}"
                raise ExportError(msg)
            out[name] = LayerEntry(found.scheme, rows, columns, variant)
        return out

    def suffixes(self, entry: LayerEntry) -> Collection[str]:
        """Return the tensor suffixes of a quantized layer."""
        assert entry.scheme.weight is not None
        return tuple(layout(entry.layout).facts(entry.scheme.weight, entry.rows, entry.columns))


def _packing(spelling: str, quantized: Collection[Scheme]) -> str:
    """Return the one `packing_format` of a checkpoint: zero points have one convention in it."""
    if spelling == "auto_round:gptqmodel":
        return spelling
    if spelling not in AutoRoundFormat.spellings:
        raise ExportError(unknown_name("format", spelling, AutoRoundFormat.spellings))
    symmetric = all(s.weight is None or s.weight.symmetric for s in quantized)
    return _SYMMETRIC if symmetric else "auto_round"


def _default(plan: LayerPlan) -> Scheme:
    """Return the scheme to write as the default: the plan's, else the commonest of its layers."""
    if plan.default.weight is not None:
        return plan.default
    schemes = [row.scheme for row in plan.quantized]
    return max(schemes, key=lambda one: sum(s.weight == one.weight for s in schemes))


def _shape(name: str, scheme: Scheme, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return rows and columns of a layer, from the shapes of its packed tensors.

    Raises:
        ExportError: a tensor is missing or no matrix, or the width does not fit.
    """
    assert scheme.weight is not None
    for suffix in ("qweight", "scales"):
        if len(shapes.get(f"{name}.{suffix}", ())) != 2:  # noqa: PLR2004
            msg = f"layer {name}: {name}.{suffix} is missing or not a matrix"
            raise ExportError(msg)
    words, rows = shapes[f"{name}.qweight"]
    if words * _WORD % scheme.weight.bits:
        msg = (
            f"layer {name}: {words} words of {_WORD} bits in {name}.qweight are no whole number "
            f"of {scheme.weight.bits}-bit codes; the config names the wrong bits"
        )
        raise ExportError(msg)
    return rows, words * _WORD // scheme.weight.bits


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
