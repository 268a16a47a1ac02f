"""Format `nf4`: packed NF4 layers in safetensors files, opened by Transformers with ar-kernels.

`quant_method` is auto-round and `packing_format` auto_round:nf4. ar-kernels looks the bit order
up among its layouts, so `from_pretrained` needs no code of ours. A reader without this package
says which packing it lacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_export import ExportError, LayerEntry
from ar_kernels import KernelError
from ar_kernels.hf.config import parse
from ar_plugin_nf4.data_type import NormalFloat4
from ar_plugin_nf4.layout import Nf4Layout
from ar_schemes import SchemeError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch
    from torch import Tensor

    from ar_export.formats.base import Request
    from ar_kernels import QuantizedWeight
    from ar_kernels.layouts import TensorFact
    from ar_schemes import LayerPlan, Scheme

METHOD = "auto-round"
PACKING = "auto_round:nf4"
_LAYOUT = Nf4Layout()


class Nf4Format:
    """Layers of data type nf4; others stay in 16 bit."""

    name = "nf4"
    spellings = ("nf4",)
    summary = "4-bit NormalFloat; Transformers with ar-kernels and ar-plugin-nf4"

    def refuses(
        self,
        spelling: str,  # noqa: ARG002
        scheme: Scheme,
        rows: int,
        columns: int,
    ) -> str | None:
        """Return why a layer [rows, columns] cannot be carried, or None."""
        if scheme.weight is None:
            return None
        if scheme.activation is not None:
            return "nf4 carries weights only, not quantized activations"
        if scheme.weight.data_type != "nf4":
            return f"nf4 carries the data type nf4 only, not {scheme.weight.data_type}"
        why = NormalFloat4().refuses(scheme.weight)
        return why or _LAYOUT.refuses(scheme.weight, rows, columns)

    def config(self, request: Request) -> dict[str, Any]:
        """Return the `quantization_config` to write.

        Raises:
            ExportError: no layer of the plan is quantized.
        """
        if not request.plan.quantized:
            msg = "format nf4: the plan quantizes no layer, so there is nothing to pack"
            raise ExportError(msg)
        facts = {k: v for k, v in request.facts.items() if v is not None}
        default = request.plan.quantized[0].scheme.to_dict()
        return facts | {
            "quant_method": METHOD,
            "packing_format": PACKING,
            **default,
            "block_name_to_quantize": ",".join(request.blocks),
            "extra_config": extra(request.plan, default),
        }

    def tensors(
        self,
        config: Mapping[str, Any] | None,  # noqa: ARG002
        weight: QuantizedWeight,
        dtype: torch.dtype,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the packed tensors of a layer by suffix."""
        return _LAYOUT.pack(weight)

    def reads(self, config: Mapping[str, Any] | None) -> bool:
        """Tell whether a checkpoint with this `quantization_config` is of this format."""
        return (
            config is not None
            and config.get("quant_method") == METHOD
            and config.get("packing_format") == PACKING
        )

    def layers(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorFact]
    ) -> dict[str, LayerEntry]:
        """Return the quantized layers of a checkpoint from its config and its tensors.

        Raises:
            ExportError: config and tensors contradict each other.
        """
        packed = {
            name.removesuffix(".codes"): fact.shape
            for name, fact in tensors.items()
            if name.endswith(".codes")
        }
        try:
            said = parse(config).resolve({name: (name,) for name in packed})
        except (KernelError, SchemeError) as error:
            msg = f"quantization_config: {error}"
            raise ExportError(msg) from error
        out = {}
        for name, shape in packed.items():
            found = said.get(name)
            if found is None or found.scheme.weight is None or len(shape) != 2:  # noqa: PLR2004
                msg = f"layer {name}: the config does not fit its packed tensors"
                raise ExportError(msg)
            out[name] = LayerEntry(found.scheme, shape[0], 2 * shape[1], _LAYOUT.name)
        return out

    def suffixes(self, entry: LayerEntry) -> Collection[str]:
        """Return the tensor suffixes of a quantized layer."""
        assert entry.scheme.weight is not None
        return tuple(_LAYOUT.facts(entry.scheme.weight, entry.rows, entry.columns))


def extra(plan: LayerPlan, default: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs from the default, layer by layer."""
    out: dict[str, Any] = {}
    for row in plan.rows:
        inside = row.layer.block is not None
        mine = row.scheme.to_dict()
        if (row.quantized and (mine != default or not inside)) or (inside and not row.quantized):
            out[row.layer.name] = mine
    return out
