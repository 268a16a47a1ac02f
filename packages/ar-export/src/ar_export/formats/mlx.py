"""Format `mlx`: what mlx-lm reads on Apple silicon (and, slowly, on Linux).

Integers in groups of 32, 64 or 128; asymmetric ones get a float minimum, as MLX computes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ar_export.errors import ExportError
from ar_export.formats.packed import (
    config_errors,
    default_scheme,
    entry,
    require_quantized,
    skipped,
    suffixes_of,
)
from ar_export.formats.scales import with_scales_of
from ar_kernels import layout
from ar_schemes import Granularity, LayerPlan, Scheme, Span, TensorSpec, describe

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch
    from torch import Tensor

    from ar_export.formats.base import LayerEntry, Request
    from ar_kernels import QuantizedWeight
    from ar_kernels.layouts.base import TensorFact

_LAYOUT = "mlx"
_SHIFTED = "int_asym_float_zp"
_TURNED = ("gpt2",)
"""Model types whose packed weights mlx-lm would transpose as if they were floats."""


class MlxFormat:
    """Format `mlx`."""

    name = "mlx"
    spellings = ("mlx", "auto_round:mlx")
    summary = "int 2-6, 8 bits in groups of 32, 64, 128; mlx-lm"

    def refuses(self, spelling: str, scheme: Scheme, rows: int, columns: int) -> str | None:  # noqa: ARG002
        """Return why a layer [rows, columns] cannot be carried, or None."""
        if scheme.weight is None:
            return None
        if scheme.activation is not None:
            return "mlx has weights only, no quantized activations"
        return layout(_LAYOUT).refuses(scheme.weight, rows, columns)

    def adjust(self, spelling: str, plan: LayerPlan, config: Mapping[str, Any]) -> LayerPlan:  # noqa: ARG002
        """Return the plan with float minima for zero points and scales in the model's type."""
        rows = tuple(replace(row, scheme=_with_minimum(row.scheme)) for row in plan.rows)
        found = LayerPlan(rows=rows, default=_with_minimum(plan.default))
        return with_scales_of(found, config, ("int", _SHIFTED))

    def config(self, request: Request) -> dict[str, Any]:
        """Return the `quantization_config` to write: that of mlx-lm, and what is symmetric.

        Raises:
            ExportError: no layer is quantized, or a model whose packed weights mlx-lm does not
                read.
        """
        require_quantized(request)
        kind = request.config.get("model_type")
        if kind in _TURNED:
            msg = f"format {request.format}: mlx-lm transposes weights of {kind}, packed ones too"
            raise ExportError(msg)
        default = _numbers(default_scheme(request.plan))
        out: dict[str, Any] = {**default, "mode": "affine"}
        out |= {
            r.layer.name: mine
            for r in request.plan.quantized
            if (mine := _numbers(r.scheme)) != default
        }
        return out | dict.fromkeys(skipped(request.plan), False)

    def beside(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what config.json holds beside: the key and the words that mlx-lm knows."""
        plain = {k: _known(v) if isinstance(v, dict) else v for k, v in config.items()}
        return {"quantization": _known(plain)}

    def tensors(
        self,
        config: Mapping[str, Any] | None,  # noqa: ARG002
        weight: QuantizedWeight,
        dtype: torch.dtype,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the packed tensors of a layer by suffix."""
        return layout(_LAYOUT).pack(weight)

    def reads(self, config: Mapping[str, Any] | None) -> bool:
        """Tell whether a checkpoint with this `quantization_config` is of this format."""
        if config is None or "quant_method" in config:
            return False
        return {"group_size", "bits"} <= config.keys() and config.get("mode", "affine") == "affine"

    def layers(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorFact]
    ) -> dict[str, LayerEntry]:
        """Return the quantized layers of a checkpoint from its config and its tensors."""
        names = [k.removesuffix(".scales") for k in tensors if k.endswith(".scales")]
        out = {}
        for name in names:
            said = config.get(name, config)
            if not isinstance(said, dict):
                msg = f"layer {name} has packed tensors but the config says it is not quantized"
                raise ExportError(msg)
            with config_errors():
                found = _scheme({**_top(config), **said})
            out[name] = entry(name, found, _LAYOUT, tensors)
        return out

    def suffixes(self, entry: LayerEntry) -> Collection[str]:
        """Return the tensor suffixes of a quantized layer."""
        return suffixes_of(entry)


def _shifted(spec: TensorSpec) -> TensorSpec:
    """Return the spec with a float minimum for an integer zero point."""
    zero = spec.data_type == "int" and not spec.symmetric
    return spec.with_(data_type=_SHIFTED) if zero else spec


def _with_minimum(scheme: Scheme) -> Scheme:
    if scheme.weight is None:
        return scheme
    return replace(scheme, weight=_shifted(scheme.weight))


def _numbers(scheme: Scheme) -> dict[str, Any]:
    spec = scheme.weight
    assert spec is not None
    return {"group_size": spec.group_size, "bits": spec.bits, "sym": spec.symmetric}


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "sym"}


def _top(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("group_size", "bits", "sym") if key in config}


def _scheme(flat: Mapping[str, Any]) -> Scheme:
    """Return the scheme of a layer; of files by others a minimum is all that is known."""
    symmetric = bool(flat.get("sym", False))
    spec = TensorSpec(
        data_type="int" if symmetric else _SHIFTED,
        bits=flat["bits"],
        granularity=Granularity(Span.GROUP, (flat["group_size"],)),
        symmetric=symmetric,
    )
    made = Scheme(name="", weight=spec)
    return replace(made, name=describe(made))
